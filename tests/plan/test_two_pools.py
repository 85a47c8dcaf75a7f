"""Two memories: the division and the formats together, against brute force over all of them."""

import itertools
import math
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

import ramgguf
from made_speeds import made_speeds
from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan import PlanOptions, SpeedLimit, TokenWork
from ramgguf.plan.frontier import plan_at
from ramgguf.plan.pools import DivisionRoom, PooledProblem, Pools
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints, Division, Plan
from synthetic import SOURCE, measurement, norm, tensor

FAST = ("Q3_K", "Q6_K")
FORMATS = ("Q3_K", "Q5_K", "Q8_0")  # of these, only Q3_K is the CPU's


def _small(seed: int, *, tied: bool, moe: bool) -> Measurement:
    """Return three layers with two tensors each, an embedding and a norm, few formats each."""
    rng = np.random.default_rng(seed)

    def few(name: str, role: str, layer: int | None) -> TensorMeasurement:
        made = tensor(name, (256, int(rng.integers(1, 40))), role, layer, rng)
        names = {*rng.choice(FORMATS, 2, replace=False), "F16"}
        return made.model_copy(
            update={"points": tuple(p for p in made.points if p.format in names)}
        )

    tensors = [few("token_embd.weight", "tied_embedding" if tied else "embedding", None)]
    if not tied:
        tensors.append(few("output.weight", "head", None))
    for i in range(3):
        large = "ffn_up_exps" if moe and i > 0 else "ffn_up"
        tensors.append(few(f"blk.{i}.attn_q.weight", "attn_q", i))
        tensors.append(few(f"blk.{i}.{large}.weight", large, i))
    tensors.append(norm("output_norm.weight", 256, None))
    return Measurement(
        ramgguf_version="0",
        source=SOURCE,
        encoder="rtn",
        formats=FORMATS,
        n_overhead_bytes=4096,
        alignment=32,
        n_layers=3,
        tensors=tuple(tensors),
    )


def _places(name: str, division: Division, *, tied: bool) -> tuple[bool, bool, bool]:
    """Return whether a tensor takes RAM, takes the GPU's memory, and is multiplied by the CPU.

    Written from llama.cpp's options for three layers, and from nothing in ramgguf.
    """
    on_gpu = division.n_gpu_layers
    if name == "token_embd.weight":
        return True, tied and on_gpu > 0, tied and on_gpu == 0
    layer = re.match(r"blk\.(\d)\.", name)
    number = int(layer[1]) if layer else 3  # the output layer comes after the last one
    here = number in range(4)[4 - on_gpu :] if on_gpu else False
    if re.search(r"\.ffn_(up|down|gate)_exps", name) and number < division.n_cpu_moe:
        here = False
    return not here, here, not here


def _problem(made: Measurement, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    factors = {t.name: float(rng.lognormal()) for t in made.tensors}

    def cost(t: TensorMeasurement, p: Point) -> float:
        return factors[t.name] * t.n_weights * p.nmse

    return Problem.of(made, Constraints(min_sqnr_db=-100), cost)


def _divisions(*, moe: bool) -> list[Division]:
    dense = [Division(n_gpu_layers=n) for n in range(5)]
    return dense + [Division(n_gpu_layers=4, n_cpu_moe=n) for n in (2, 3) if moe]


def _selections(
    problem: Problem, division: Division, *, tied: bool
) -> Iterator[tuple[int, int, int, float]]:
    """Yield RAM, GPU, file and cost of every selection that the CPU's formats allow."""
    options = []
    for candidates, group in zip(problem.candidates, problem.groups, strict=True):
        name = candidates.tensor.name
        ram, vram, on_cpu = _places(name, division, tied=tied)
        own = [
            (p.format, padded(p.n_bytes, 32), c.cost)
            for (p,), c in zip(group.points, group.choices, strict=True)
        ]
        if on_cpu and any(f in FAST for f, _, _ in own):
            own = [o for o in own if o[0] in FAST]
        options.append([(n * ram, n * vram, n, cost) for _, n, cost in own])
    for chosen in itertools.product(*options):
        yield (
            sum(c[0] for c in chosen),
            sum(c[1] for c in chosen),
            sum(c[2] for c in chosen),
            math.fsum(c[3] for c in chosen),
        )


KINDS = list(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize(("tied", "moe"), KINDS)
def test_the_cost_is_the_least_over_all_divisions_and_formats(
    seed: int, tied: bool, moe: bool
) -> None:
    problem = _problem(_small(seed, tied=tied, moe=moe), seed)
    divisions = _divisions(moe=moe)
    table = {
        k: np.array(list(_selections(problem, division, tied=tied)))
        for k, division in enumerate(divisions)
    }
    # Limits that one selection of one division, drawn at random, just keeps: some are feasible.
    rng = np.random.default_rng(seed)
    drawn = table[int(rng.integers(len(divisions)))]
    ram, vram, n_bytes, _ = drawn[int(rng.integers(len(drawn)))]
    for budget in (math.inf, math.floor(n_bytes * 1.01)):
        fitting = {
            k: rows[(rows[:, 0] <= ram) & (rows[:, 1] <= vram) & (rows[:, 2] <= budget), 3]
            for k, rows in table.items()
        }
        least = min(float(costs.min()) for costs in fitting.values() if len(costs))
        rooms = tuple(DivisionRoom(d, int(ram), int(vram)) for d in divisions)
        pooled = PooledProblem(problem, Pools(rooms, 3, tied, FAST))
        solution, division = pooled.solved(10**9 if budget == math.inf else int(budget))
        k = divisions.index(division.model_copy(update={"cpu_formats": None}))
        assert min(fitting[k]) == pytest.approx(solution.cost, rel=1e-9), "of that division"
        if budget == math.inf:
            assert solution.cost == pytest.approx(least, rel=1e-9)
            assert solution.gap == 0
        else:  # three limits: branch and bound may stop early, and says how far from the optimum
            assert least <= solution.cost * (1 + 1e-9)
            assert solution.cost * (1 - solution.gap) <= least * (1 + 1e-9)


def test_three_limits_are_mostly_solved_to_the_optimum_too() -> None:
    n_optimal = 0
    for seed in range(24):
        problem = _problem(_small(seed, tied=True, moe=False), seed)
        divisions = _divisions(moe=False)
        rows = [np.array(list(_selections(problem, d, tied=True))) for d in divisions]
        drawn = rows[seed % len(rows)][seed * 7 % len(rows[seed % len(rows)])]
        ram, vram, n_bytes, _ = drawn
        fits = [(r[:, 0] <= ram) & (r[:, 1] <= vram) & (r[:, 2] <= n_bytes) for r in rows]
        least = min(float(r[f, 3].min()) for r, f in zip(rows, fits, strict=True) if f.any())
        rooms = tuple(DivisionRoom(d, int(ram), int(vram)) for d in divisions)
        solution, _ = PooledProblem(problem, Pools(rooms, 3, True, FAST)).solved(int(n_bytes))
        n_optimal += solution.cost <= least * (1 + 1e-9)
    assert n_optimal >= 22


def _pools(
    divisions: list[Division],
    ram: int | None,
    vram: int | None,
    *,
    tied: bool = False,
    cpu_formats: tuple[str, ...] | None = FAST,
) -> Pools:
    return Pools(tuple(DivisionRoom(d, ram, vram) for d in divisions), 3, tied, cpu_formats)


def test_of_divisions_that_cost_the_same_the_one_with_the_most_on_the_gpu_is_taken() -> None:
    problem = _problem(_small(1, tied=False, moe=True), 1)
    divisions = _divisions(moe=True)
    for order in (divisions, divisions[::-1]):
        solution, division = PooledProblem(
            problem, _pools(order, 10**9, 10**9, cpu_formats=None)
        ).solved(10**9)
        assert solution.cost == 0  # all in F16, wherever it lies
        assert (division.n_gpu_layers, division.n_cpu_moe) == (4, 0)
    largest = max(c.n_bytes for c in problem.groups[-2].choices)
    everything = sum(max(c.n_bytes for c in g.choices) for g in problem.groups)
    solution, division = PooledProblem(
        problem, _pools(divisions, 10**9, everything - largest, cpu_formats=None)
    ).solved(10**9)
    assert solution.cost == 0
    assert division.n_gpu_layers == 4
    assert division.n_cpu_moe > 0 or problem.groups[0].choices[-1].n_bytes >= largest


def test_tensors_that_are_tied_across_both_memories_are_within_both_limits() -> None:
    made = _small(3, tied=False, moe=True)
    rng = np.random.default_rng(3)
    points = {t.name: tensor(t.name, t.shape, t.role, t.layer, rng).points for t in made.tensors}
    made = made.model_copy(
        update={
            "tensors": tuple(
                t if t.kept else t.model_copy(update={"points": points[t.name]})
                for t in made.tensors
            )
        }
    )
    ties = (("attn_q", "ffn_up_exps"),)
    factors = {t.name: float(rng.lognormal()) for t in made.tensors}
    problem = Problem.of(
        made,
        Constraints(min_sqnr_db=-100, ties=ties),
        lambda t, p: factors[t.name] * t.n_weights * p.nmse,
    )
    division = Division(n_gpu_layers=4, n_cpu_moe=3)
    sizes = {name: max(p.n_bytes for p in own) for name, own in points.items()}
    ram = sum(n for name, n in sizes.items() if "_exps" in name or name == "token_embd.weight")
    vram = sum(sizes.values()) - ram
    pools = _pools([division], ram * 4 // 10, vram * 4 // 10, cpu_formats=None)
    solution, _ = PooledProblem(problem, pools).solved(10**9)
    found = {a.name: a for a in problem.assignments(solution.chosen)}
    assert found["blk.1.attn_q.weight"].format == found["blk.1.ffn_up_exps.weight"].format
    used = [0, 0]
    for name, a in found.items():
        in_ram, in_vram, _ = _places(name, division, tied=False)
        used[0] += in_ram * padded(a.n_bytes, 32)
        used[1] += in_vram * padded(a.n_bytes, 32)
    assert used[0] <= ram * 4 // 10
    assert used[1] <= vram * 4 // 10
    assert 0 < solution.gap < 0.2 or solution.gap == 0


def test_what_no_division_fits_is_an_error_with_the_smallest_file() -> None:
    problem = _problem(_small(2, tied=True, moe=False), 2)
    pools = _pools(_divisions(moe=False), 1000, 1000, tied=True)
    with pytest.raises(BudgetError, match="no division between RAM and GPU") as caught:
        PooledProblem(problem, pools).solved(10**9)
    least = sum(min(c.n_bytes for c in g.choices) for g in problem.groups)
    assert caught.value.smallest is not None
    assert caught.value.smallest >= 4096 + least


def test_a_plan_says_its_division_and_the_formats_of_the_cpu_s_side() -> None:
    made = measurement(4)
    rooms = tuple(DivisionRoom(Division(n_gpu_layers=n), 900_000, 1_000_000) for n in range(6))
    options: PlanOptions = {"min_sqnr_db": -100, "pools": Pools(rooms, 4, True, FAST)}
    plan = ramgguf.plan(made, 10**9, **options)
    assert plan.division is not None
    assert plan.division.options == f"-ngl {plan.division.n_gpu_layers}"
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.next_percent is None
    assert any("were chosen from Q3_K, Q6_K (--cpu-formats)" in note for note in plan.notes)
    in_ram = [
        a
        for a in plan.assignments
        if a.note is None
        and a.name.startswith("blk.")
        and int(a.name.split(".")[1]) < 5 - plan.division.n_gpu_layers
    ]
    assert in_ram
    assert {a.format for a in in_ram} <= set(FAST)


def test_formats_of_the_cpu_s_side_that_suit_nothing_are_told_and_others_taken() -> None:
    made = measurement(2)
    pools = Pools((DivisionRoom(Division(n_gpu_layers=1), 10**9, 10**9),), 2, True, ("IQ4_NL",))
    plan = ramgguf.plan(made, 10**9, pools=pools)
    assert any("none of these suits 14 tensors on the CPU's side" in note for note in plan.notes)
    assert plan.total_cost == 0


def test_a_least_speed_is_refused_for_two_memories() -> None:
    pools = Pools((DivisionRoom(Division(n_gpu_layers=1), 10**9, 10**9),), 2, True)
    with pytest.raises(PlanError, match="a least speed does not go with a GPU"):
        ramgguf.plan(
            measurement(2),
            10**9,
            pools=pools,
            speed=SpeedLimit(made_speeds(), TokenWork(2, {}, {}), generation=1.0),
        )


def test_the_options_of_a_division_are_llama_cpp_s() -> None:
    assert Division(n_gpu_layers=17).options == "-ngl 17"
    assert Division(n_gpu_layers=49, n_cpu_moe=12).options == "-ngl 49 --n-cpu-moe 12"
    assert Division(n_gpu_layers=0).options == "-ngl 0 --device none"


def test_a_frontier_gives_the_largest_plan_that_a_division_fits() -> None:
    made = measurement(4)
    frontier = ramgguf.curve(made, min_sqnr_db=-100)
    divisions = [Division(n_gpu_layers=n) for n in range(6)]
    pools = Pools(tuple(DivisionRoom(d, 800_000, 1_000_000) for d in divisions), 4, True)
    plan = plan_at(frontier, 10**9, pools)
    assert plan.division is not None
    used = [0, 0]
    for a in plan.assignments:
        layer = re.match(r"blk\.(\d)\.", a.name)
        first = 5 - plan.division.n_gpu_layers
        here = (int(layer[1]) if layer else 4) >= first
        tied = a.name == "token_embd.weight"
        used[0] += a.n_bytes * (tied or not here)
        used[1] += a.n_bytes * (here if not tied else plan.division.n_gpu_layers > 0)
    assert used[0] <= 800_000
    assert used[1] <= 1_000_000
    larger = plan_at(
        frontier,
        10**9,
        Pools(tuple(DivisionRoom(d, 900_000, 1_100_000) for d in divisions), 4, True),
    )
    assert larger.total_cost < plan.total_cost
    with pytest.raises(BudgetError, match="the frontier's start"):
        plan_at(
            frontier, 10**9, Pools(tuple(DivisionRoom(d, 4_000, 5_000) for d in divisions), 4, True)
        )


def test_a_model_of_80_layers_is_planned_in_seconds() -> None:
    made = measurement(80)
    problem = _problem(made, 0)
    total = sum(max(c.n_bytes for c in g.choices) for g in problem.groups)
    divisions = [Division(n_gpu_layers=n) for n in range(82)]
    pools = Pools(
        tuple(DivisionRoom(d, total * 15 // 100, total * 15 // 100) for d in divisions),
        80,
        True,
        FAST,
    )
    start = time.process_time()
    solution, division = PooledProblem(problem, pools).solved(10**12)
    assert time.process_time() - start < 20
    assert solution.gap < 1e-3
    assert 0 < division.n_gpu_layers < 81
