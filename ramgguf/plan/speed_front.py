"""The best plans by size, cost, speed of generation and of prompts: a look before a choice.

At prices for a byte, a second of generation and a second of a prompt, each group's cheapest choice
makes a plan that no other beats in all four. Prices are taken from a grid: what lies between them,
and plans that are best at no prices, are left out.
"""

from itertools import product
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.documents import Document, FrozenModel, NonNegativeFloat, Positive, PositiveFloat
from ramgguf.gguf.identity import Source
from ramgguf.measure.result import Measurement
from ramgguf.plan.objectives import Costing
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints, PredictedKLD
from ramgguf.plan.speed import SpeedLimit, TimedProblem
from ramgguf.quants.encoders import EncoderName

Floats = NDArray[np.float64]
# Prices, as multiples of those at which a measure matters as much as the cost; 0 for not at all.
_PRICES = (0.0, *np.geomspace(1e-3, 1e3, 13).tolist())
_SECOND_PRICES = (0.0, *np.geomspace(1e-2, 1e2, 7).tolist())
_MOST_SHOWN = 20


class FrontPlan(FrozenModel):
    """A plan of the front: bytes of the file, cost, and tokens per second, predicted.

    kld is the KLD that sensitivities predict; None by priors, which predict none.
    """

    n_bytes: Positive
    cost: NonNegativeFloat
    generation: PositiveFloat
    prompt: PositiveFloat
    kld: PredictedKLD | None = None


class SpeedFront(Document):
    """Plans of which none is smaller, better and faster than another, by ascending bytes.

    cost is in the objective's units: Σ α · (NMSE + ρ), in nats per token, if that is sensitivity.
    """

    KIND: ClassVar[str] = "speed_front"

    ramgguf_version: str
    source: Source
    encoder: EncoderName
    objective: str
    constraints: Constraints
    n_weights: Positive
    n_overhead_bytes: int
    cpu: str
    n_threads: Positive
    engine: str
    plans: tuple[FrontPlan, ...]
    notes: tuple[str, ...] = ()

    def bpw(self, plan: FrontPlan) -> float:
        """Bits per weight of the tensors' data."""
        return 8 * (plan.n_bytes - self.n_overhead_bytes) / self.n_weights

    def spread(self, most: int = _MOST_SHOWN) -> tuple[FrontPlan, ...]:
        """Return the plans at the ends and those between that differ most from each other."""
        if len(self.plans) <= most:
            return self.plans
        places = np.log([[p.n_bytes, p.generation, p.prompt] for p in self.plans])
        cost = np.array([p.cost for p in self.plans])
        places = np.column_stack([places, 0.1 * np.log(np.maximum(cost, cost.max() * 1e-9))])
        chosen = [int(np.argmin(places[:, 0])), int(np.argmin(cost))]
        chosen += [int(np.argmax(places[:, 1])), int(np.argmax(places[:, 2]))]
        chosen = list(dict.fromkeys(chosen))
        while len(chosen) < most:
            apart = np.abs(places[:, None] - places[chosen]).sum(axis=2).min(axis=1)
            chosen.append(int(np.argmax(apart)))
        return tuple(self.plans[k] for k in sorted(chosen))


def speed_front(
    measurement: Measurement, limit: SpeedLimit, *, costing: Costing, constraints: Constraints
) -> SpeedFront:
    """Return the front of a model's plans on the machine of the limit, whose minima do not count.

    Raises PlanError when a constraint suits nothing.
    """
    problem = Problem.of(measurement, constraints, costing.cost)
    timed = TimedProblem(problem, limit)
    columns, starts = timed.columns()
    scales = _spans(columns, starts)
    found: dict[tuple[int, ...], Floats] = {}
    for byte, generation, prompt in product(_PRICES, _SECOND_PRICES, _SECOND_PRICES):
        weights = np.array([1.0, byte, generation, prompt]) / scales
        rows = _cheapest(columns @ weights, starts)
        found.setdefault(tuple(rows.tolist()), columns[rows].sum(axis=0))
    sums, selections = np.array(list(found.values())), list(found)
    fixed = limit.fixed

    def front_plan(k: int) -> FrontPlan:
        cost, n_bytes, generation, prompt = sums[k].tolist()
        assignments = problem.assignments(timed.chosen(selections[k]))
        return FrontPlan(
            n_bytes=measurement.n_overhead_bytes + round(n_bytes),
            cost=max(0.0, cost),
            generation=1 / (generation + fixed[0]),
            prompt=1 / (prompt + fixed[1]),
            kld=costing.predicted_kld(assignments, measurement.encoder),
        )

    plans = [front_plan(k) for k in _undominated(sums).tolist()]
    return SpeedFront(
        ramgguf_version=measurement.ramgguf_version,
        source=measurement.source,
        encoder=measurement.encoder,
        objective=costing.name,
        constraints=constraints,
        n_weights=measurement.n_weights,
        n_overhead_bytes=measurement.n_overhead_bytes,
        cpu=limit.profile.cpu,
        n_threads=limit.profile.n_threads,
        engine=limit.profile.engine,
        plans=tuple(sorted(plans, key=lambda p: (p.n_bytes, p.cost))),
        notes=(*timed.notes(), *costing.notes),
    )


def _spans(columns: Floats, starts: NDArray[np.intp]) -> Floats:
    """Return how much the sums of each column may differ, 1 where they may not."""
    most = np.maximum.reduceat(columns, starts).sum(axis=0)
    least = np.minimum.reduceat(columns, starts).sum(axis=0)
    spans: Floats = np.where(most > least, most - least, 1.0)
    return spans


def _cheapest(value: Floats, starts: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return each group's first row of the least value."""
    ends = [*starts[1:].tolist(), len(value)]
    return np.array(
        [start + int(np.argmin(value[start:end])) for start, end in zip(starts, ends, strict=True)]
    )


def _undominated(sums: Floats) -> NDArray[np.intp]:
    """Return the rows that no other row is at most in every column, and below in one."""
    kept = [
        k
        for k, row in enumerate(sums)
        if not ((sums <= row).all(axis=1) & (sums < row).any(axis=1)).any()
    ]
    return np.array(kept, np.intp)
