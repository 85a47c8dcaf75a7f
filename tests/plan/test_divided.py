"""What a plan for two memories allows to be changed."""

import pytest

import ramgguf
from ramgguf.gguf.layout import padded
from ramgguf.plan import DivisionRoom, Pools
from ramgguf.plan.divided import DividedPlan
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints, Division, MemoryBudget, MemoryUse, Plan
from synthetic import measurement

DIVISION = Division(n_gpu_layers=2)  # the output layer and blk.1 of two layers
MADE = measurement(2)
PROBLEM = Problem.of(MADE, Constraints(min_sqnr_db=-100), lambda t, p: t.n_weights * p.nmse)
NAMES = [t.name for t in MADE.tensors]
IN_RAM, ON_GPU = NAMES.index("blk.0.attn_q.weight"), NAMES.index("blk.1.attn_q.weight")


def _plan(ram: int, vram: int, cpu_formats: tuple[str, ...] | None) -> Plan:
    """Return a plan that leaves so many bytes of both memories."""
    pools = Pools((DivisionRoom(DIVISION, 600_000, 600_000),), 2, True, cpu_formats)
    made = ramgguf.plan(MADE, 10**9, min_sqnr_db=-100, pools=pools)
    use = MemoryUse(weights=1000)
    memory = MemoryBudget(
        limit=1000 + ram, limit_source="--memory", n_ctx=512, n_seq=1, type_k="F16", type_v="F16",
        method="llama.cpp", ram=use, n_gpu_layers=2, vram_limit=1000 + vram, vram=use,
    )  # fmt: skip
    return made.model_copy(update={"memory": memory})


def _divided(ram: int, vram: int, cpu_formats: tuple[str, ...] | None = None) -> DividedPlan:
    """Return such a plan with all in Q4_K."""
    chosen = [0 if c.note else _choice(i, "Q4_K") for i, c in enumerate(PROBLEM.candidates)]
    return DividedPlan(PROBLEM, _plan(ram, vram, cpu_formats), chosen, 2, tied=True)


def _choice(i: int, name: str) -> int:
    return [p[0].format for p in PROBLEM.groups[i].points].index(name)


def _size(i: int, name: str) -> int:
    (point,) = PROBLEM.groups[i].points[_choice(i, name)]
    return padded(point.n_bytes, MADE.alignment)


@pytest.mark.parametrize(("i", "other"), [(IN_RAM, ON_GPU), (ON_GPU, IN_RAM)])
def test_a_change_is_allowed_where_its_own_memory_has_room(i: int, other: int) -> None:
    grown = _size(i, "Q8_0") - _size(i, "Q4_K")
    assert _size(other, "Q4_K") - _size(other, "Q2_K") > 0
    changes = [(i, _choice(i, "Q8_0")), (other, _choice(other, "Q2_K"))]
    ram, vram = (grown, 0) if i == IN_RAM else (0, grown)
    assert _divided(ram, vram).allows(changes)
    assert not _divided(ram - 1, 10**9).allows(changes) or i == ON_GPU
    assert not _divided(10**9, vram - 1).allows(changes) or i == IN_RAM


def test_what_is_taken_counts_afterwards_and_in_the_record() -> None:
    more = _size(ON_GPU, "Q8_0") - _size(ON_GPU, "Q4_K")
    divided = _divided(10**6, more)
    step = [(ON_GPU, _choice(ON_GPU, "Q8_0"))]
    assert divided.allows(step)
    divided.take(step)
    assert divided.allows([])
    memory = divided.memory()
    assert memory is not None
    assert memory.vram is not None
    assert memory.vram.weights == 1000 + more
    assert memory.ram.weights == 1000
    other = NAMES.index("blk.1.ffn_up.weight")
    assert not divided.allows([(other, _choice(other, "Q5_K"))])


def test_the_cpu_s_formats_bind_changes_too_and_its_largest_tensor_does_not_grow() -> None:
    divided = _divided(10**9, 10**9, ("Q2_K", "Q3_K"))
    assert divided.allows([(IN_RAM, _choice(IN_RAM, "Q2_K"))])
    assert not divided.allows([(IN_RAM, _choice(IN_RAM, "Q4_K"))])
    assert divided.allows([(ON_GPU, _choice(ON_GPU, "Q4_K"))])
    free = _divided(10**9, 10**9)
    other = NAMES.index("blk.0.ffn_up.weight")
    assert free.allows([(IN_RAM, _choice(IN_RAM, "Q8_0"))])
    assert not free.allows([(other, _choice(other, "Q5_K"))])  # the GPU would copy more of it
