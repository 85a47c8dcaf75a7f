"""Two memories: the division and the formats together, against brute force over all of them."""

import itertools
import math
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

import ramgguf
from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.pools import PooledProblem, Pools, SplitRoom
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints, Plan, Split
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


def _places(name: str, split: Split, *, tied: bool) -> tuple[bool, bool, bool]:
    """Return whether a tensor takes RAM, takes the GPU's memory, and is multiplied by the CPU.

    Written from llama.cpp's options for three layers, and from nothing in ramgguf.
    """
    on_gpu = split.n_gpu_layers
    if name == "token_embd.weight":
        return True, tied and on_gpu > 0, tied and on_gpu == 0
    layer = re.match(r"blk\.(\d)\.", name)
    number = int(layer[1]) if layer else 3  # the output layer comes after the last one
    here = number in range(4)[4 - on_gpu :] if on_gpu else False
    if re.search(r"\.ffn_(up|down|gate)_exps", name) and number < split.n_cpu_moe:
        here = False
    return not here, here, not here


def _cost(weight: np.ndarray, t: TensorMeasurement, p: Point) -> float:
    return float(weight[hash(t.name) % len(weight)]) * p.nmse * t.n_weights


def _problem(made: Measurement, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    factors = {t.name: float(rng.lognormal()) for t in made.tensors}

    def cost(t: TensorMeasurement, p: Point) -> float:
        return factors[t.name] * t.n_weights * p.nmse

    return Problem.of(made, Constraints(min_sqnr_db=-100), cost)


def _splits(*, moe: bool) -> list[Split]:
    dense = [Split(n_gpu_layers=n) for n in range(5)]
    return dense + [Split(n_gpu_layers=4, n_cpu_moe=n) for n in (2, 3) if moe]


def _selections(
    problem: Problem, split: Split, *, tied: bool
) -> Iterator[tuple[int, int, int, float]]:
    """Yield RAM, GPU, file and cost of every selection that the CPU's formats allow."""
    options = []
    for candidates, group in zip(problem.candidates, problem.groups, strict=True):
        name = candidates.tensor.name
        ram, vram, on_cpu = _places(name, split, tied=tied)
        own = [
            (p.format, padded(p.n_bytes, 32), c.cost)
            for (p,), c in zip(group.points, group.choices, strict=True)
        ]
        if on_cpu and any(f in FAST for f, _, _ in own):
            own = [o for o in own if o[0] in FAST]
        options.append([(n * ram, n * vram, n, cost) for _, n, cost in own])
    for chosen in itertools.product(*options):
        ram, vram, n_bytes, cost = zip(*chosen, strict=True)
        yield sum(ram), sum(vram), sum(n_bytes), sum(cost)


KINDS = list(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize(("tied", "moe"), KINDS)
def test_the_cost_is_the_least_over_all_divisions_and_formats(
    seed: int, tied: bool, moe: bool
) -> None:
    problem = _problem(_small(seed, tied=tied, moe=moe), seed)
    splits = _splits(moe=moe)
    table = {
        k: np.array(list(_selections(problem, split, tied=tied))) for k, split in enumerate(splits)
    }
    # Limits that one selection of one division, drawn at random, just keeps: some are feasible.
    rng = np.random.default_rng(seed)
    drawn = table[int(rng.integers(len(splits)))]
    ram, vram, n_bytes, _ = drawn[int(rng.integers(len(drawn)))]
    for budget in (math.inf, math.floor(n_bytes * 1.01)):
        fitting = {
            k: rows[(rows[:, 0] <= ram) & (rows[:, 1] <= vram) & (rows[:, 2] <= budget), 3]
            for k, rows in table.items()
        }
        least = min(float(costs.min()) for costs in fitting.values() if len(costs))
        rooms = tuple(SplitRoom(s, int(ram), int(vram)) for s in splits)
        pooled = PooledProblem(problem, Pools(rooms, 3, tied, FAST))
        solution, split = pooled.solved(10**9 if budget == math.inf else int(budget))
        k = splits.index(split.model_copy(update={"cpu_formats": None}))
        assert min(fitting[k]) == pytest.approx(solution.cost, rel=1e-9), "of that division"
        if budget == math.inf:
            assert solution.cost == pytest.approx(least, rel=1e-9)
            assert solution.gap == 0
        else:  # three limits: branch and bound may stop early, and says how far from the optimum
            assert least <= solution.cost * (1 + 1e-9)
            assert solution.cost * (1 - solution.gap) <= least * (1 + 1e-9)
