"""Which formats are measured: a sample of each tensor tells, where measuring takes time.

A plan by the sample says what each tensor is measured in. What is found replaces what the sample
says of these formats, and the next plan may take others, of few tensors; they are measured in turn,
until a plan takes nothing but what was measured.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from ramgguf.core.errors import BudgetError
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan import DEFAULT_MIN_SQNR_DB, PlanOptions, price, problem, smallest
from ramgguf.plan.result import Plan
from ramgguf.quants import formats

MANY_WEIGHTS = 1 << 26  # below this, measuring everything takes a second or less
NOTE = "a sample of each tensor selected the formats to measure; the gap is among these"

MOST_ROUNDS = 4  # of measuring: later ones change a tensor or two, and each plans anew
# A bit more or less changes what a byte buys by a factor of 4.
_PRICE_RANGE = np.geomspace(1 / 3, 3, 9)
_FLOOR_MARGIN_DB = 0.5

Stage = Callable[[str], AbstractContextManager[None]]
Formats = Mapping[str, frozenset[str]]  # by tensor


class Measure(Protocol):
    """Measures a model: some rows of each tensor, or all rows in the formats of `only`; without
    `others`, of the tensors that `only` names.
    """

    def __call__(
        self, *, sampled: bool = False, only: Formats | None = None, others: bool = True
    ) -> Measurement: ...


def measure_and_plan(
    measure: Measure,
    plan: Callable[[Measurement], Plan],
    options: PlanOptions,
    stage: Stage,
    *,
    preselects: bool,
    alternatives: bool = False,
) -> tuple[Measurement, Plan]:
    """Return the plan and what was measured for it; stage times what it does.

    If it preselects, formats that a sample shows not to be worth their bytes are not measured;
    should no plan of the others fit, all are. With alternatives, each tensor is also measured in
    what it would have at other sizes. Raises what plan raises.
    """
    if preselects:
        try:
            return _by_sample(measure, plan, options, stage, alternatives=alternatives)
        except BudgetError:
            pass
    with stage("measure"):
        found = measure()
    with stage("plan"):
        return found, plan(found)


def _by_sample(
    measure: Measure,
    plan: Callable[[Measurement], Plan],
    options: PlanOptions,
    stage: Stage,
    *,
    alternatives: bool,
) -> tuple[Measurement, Plan]:
    with stage("sample"):
        sampled = measure(sampled=True)
        first = plan(sampled)
        only = _chosen(first)
        if alternatives:
            also = worth_measuring(sampled, first.n_bytes, options)
            only = {name: also.get(name, frozenset()) | own for name, own in only.items()}
    known = _Known(sampled)
    with stage("measure"):
        known.add(measure(only=only), only)
    for _ in range(MOST_ROUNDS - 1):
        with stage("plan"):
            new = known.lacks(_chosen(plan(known.with_sample())))
        if not new:
            break
        with stage("measure"):
            known.add(measure(only=new, others=False), new)
    with stage("plan"):
        found = known.alone()
        made = plan(found)
    return found, made.model_copy(update={"notes": (*made.notes, NOTE)})


def _chosen(plan: Plan) -> dict[str, frozenset[str]]:
    """Return the format that each tensor has in the plan; none where it keeps its own."""
    return {
        a.name: frozenset({a.format} if a.format != a.source_format else ())
        for a in plan.assignments
    }


class _Known:
    """What is known of every tensor: its points on all rows, and those of the sample."""

    def __init__(self, sampled: Measurement) -> None:
        self._sampled = sampled
        self._whole: dict[str, TensorMeasurement] = {}
        self._measured: dict[str, frozenset[str]] = {}
        self._first = sampled

    def add(self, found: Measurement, formats_of: Formats) -> None:
        """Take what was found on all rows of the tensors, in these formats."""
        if not self._whole:
            self._first = found
        for tensor in found.tensors:
            name, before = tensor.name, self._whole.get(tensor.name)
            self._measured[name] = self._measured.get(name, frozenset()) | formats_of[name]
            if before is not None:
                points = {p.format: p for p in (*before.points, *tensor.points)}
                excluded = {**before.excluded, **tensor.excluded}
                tensor = _with_points(tensor, tuple(points.values()), excluded)
            self._whole[name] = tensor

    def lacks(self, wanted: Formats) -> dict[str, frozenset[str]]:
        """Return which of the formats have not been measured, for the tensors that lack some.

        What libggml encodes is measured on the same rows in either way.
        """
        missing = {
            name: frozenset(f for f in own - self._measured[name] if formats.get(f).encodable)
            for name, own in wanted.items()
        }
        return {name: own for name, own in missing.items() if own}

    def with_sample(self) -> Measurement:
        """Return the measurement with what the sample says of formats that were not measured."""
        return self._merged(lambda _: True)

    def alone(self) -> Measurement:
        """Return what was measured, and what is measured on a sample in any case."""
        return self._merged(lambda name: not formats.get(name).encodable)

    def _merged(self, keeps: Callable[[str], bool]) -> Measurement:
        """Return what was measured, with those formats of the sample besides that it keeps."""
        tensors = []
        for guess in self._sampled.tensors:
            whole = self._whole[guess.name]
            done = self._measured[guess.name] | {guess.source_format}
            added = (p for p in guess.points if p.format not in done and keeps(p.format))
            excluded = {**guess.excluded, **whole.excluded}
            tensors.append(_with_points(whole, (*whole.points, *added), excluded))
        update = {"tensors": tuple(tensors), "notes": self._sampled.notes}
        return self._first.model_copy(update=update)


def _with_points(
    tensor: TensorMeasurement, points: tuple[Point, ...], excluded: dict[str, str]
) -> TensorMeasurement:
    ordered = tuple(sorted(points, key=lambda p: (p.n_bytes, p.nmse)))
    return tensor.model_copy(update={"points": ordered, "excluded": excluded})


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
