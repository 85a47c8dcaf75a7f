"""Which formats are worth measuring: a sample of each tensor tells, where measuring takes time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from ramgguf.core.errors import BudgetError
from ramgguf.measure.result import Measurement
from ramgguf.plan import DEFAULT_MIN_SQNR_DB, PlanOptions, price, problem, smallest
from ramgguf.plan.result import Plan

MANY_WEIGHTS = 1 << 26  # below this, measuring everything takes a second or less
NOTE = "a sample of each tensor selected the formats to measure; the gap is among these"

# A bit more or less changes what a byte buys by a factor of 4.
_PRICE_RANGE = np.geomspace(1 / 3, 3, 9)
_FLOOR_MARGIN_DB = 0.5

Stage = Callable[[str], AbstractContextManager[None]]


class Measure(Protocol):
    """Measures a model: some rows of each tensor, or all rows in the formats of `only`."""

    def __call__(
        self, *, sampled: bool = False, only: dict[str, frozenset[str]] | None = None
    ) -> Measurement: ...


def measure_and_plan(
    measure: Measure,
    plan: Callable[[Measurement], Plan],
    options: PlanOptions,
    stage: Stage,
    *,
    preselects: bool,
) -> tuple[Measurement, Plan]:
    """Return the plan and what was measured for it; stage times what it does.

    If it preselects, only formats that can be worth their bytes are measured; should no plan of
    these fit, all are. Raises what plan raises.
    """
    if preselects:
        try:
            with stage("sample"):
                sampled = measure(sampled=True)
                only = worth_measuring(sampled, plan(sampled).n_bytes, options)
            with stage("measure"):
                found = measure(only=only)
            with stage("plan"):
                made = plan(found)
            return found, made.model_copy(update={"notes": (*made.notes, NOTE)})
        except BudgetError:
            pass
    with stage("measure"):
        found = measure()
    with stage("plan"):
        return found, plan(found)


def worth_measuring(
    sampled: Measurement, n_bytes: int, options: PlanOptions
) -> dict[str, frozenset[str]]:
    """Return, by tensor, the formats that a plan of about n_bytes may take, judged by a sample.

    These are the best ones at a third to three times the price per byte that the sample comes to,
    with an SQNR floor a little lower and a little higher.
    """
    found: dict[str, set[str]] = {}
    floor = options.get("min_sqnr_db", DEFAULT_MIN_SQNR_DB)
    for margin in (-_FLOOR_MARGIN_DB, _FLOOR_MARGIN_DB):
        shifted: PlanOptions = {**options, "min_sqnr_db": floor + margin}
        posed = problem(sampled, shifted)
        capacity = max(n_bytes - sampled.n_overhead_bytes, smallest(posed.items))
        prices = price(posed.items, capacity) * _PRICE_RANGE
        for group in posed.groups:
            costs = np.array([c.cost for c in group.choices])
            sizes = np.array([c.n_bytes for c in group.choices])
            for best in set(np.argmin(costs + prices[:, None] * sizes, axis=1).tolist()):
                for member, point in zip(group.members, group.points[best], strict=True):
                    found.setdefault(sampled.tensors[member].name, set()).add(point.format)
    return {name: frozenset(names) for name, names in found.items()}
