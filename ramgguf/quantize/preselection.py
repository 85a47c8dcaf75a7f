"""Which formats are measured: a sample of each tensor tells, where measuring takes time.

A plan by the sample says what each tensor is measured in. What is found replaces what the sample
says of these formats, and the next plan may take others, of few tensors; they are measured in turn,
until a plan takes nothing but what was measured.

What libggml encodes takes a hundred times as long, even on a sample. It is tried for the tensors
that a plan could give it if it made the most of its bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np

from ramgguf.core.errors import BudgetError
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan import DEFAULT_MIN_SQNR_DB, PlanOptions, price, problem, smallest
from ramgguf.plan.result import Pin, Plan
from ramgguf.quants import formats

MANY_WEIGHTS = 1 << 26  # below this, measuring everything takes a second or less
NOTE = "a sample of each tensor selected the formats to measure; the gap is among these"

MOST_GUESSES = 8  # plans that a format of libggml might be in
MOST_ROUNDS = 4  # of measuring: later ones change a tensor or two, and each plans anew
# A bit more or less changes what a byte buys by a factor of 4.
_PRICE_RANGE = np.geomspace(1 / 3, 3, 9)
_FLOOR_MARGIN_DB = 0.5
# A format's NMSE is about that of the next larger ones, times 4 for every bit less. On smol768,
# 95 % of libggml's formats have at least 0.8 of that with a matrix, all have 0.55.
_LEAST_SHARE = 0.8
_ENOUGH_SEEN = 4  # that the least share of these is taken for the others
_WORTH_TRYING = 0.02  # of a plan's cost: what libggml's formats may save at most, to be tried

Stage = Callable[[str], AbstractContextManager[None]]
Formats = Mapping[str, frozenset[str]]  # by tensor


class Measure(Protocol):
    """Measures a model: some rows of each tensor, or all rows in the formats of `only`; without
    `others`, of the tensors that `only` names; without `slow`, in no format of libggml.
    """

    def __call__(
        self,
        *,
        sampled: bool = False,
        slow: bool = True,
        only: Formats | None = None,
        others: bool = True,
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
        sampled, first = _sampled(measure, plan, options)
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


def _sampled(
    measure: Measure, plan: Callable[[Measurement], Plan], options: PlanOptions
) -> tuple[Measurement, Plan]:
    """Return a sample of every tensor in the formats that may suit, and the plan by it."""
    pinned = {Pin.parse(pin).format for pin in options.get("pins", ())}
    is_pinned = not pinned.isdisjoint(formats.with_importance())
    found = measure(sampled=True, slow=is_pinned)
    slow = [name for name in found.formats if name in formats.with_importance()]
    if is_pinned or not slow:
        return found, plan(found)
    try:
        made = plan(found)
    except BudgetError:  # none fits without them
        found = measure(sampled=True)
        return found, plan(found)
    tried: dict[str, frozenset[str]] = {}
    share, seen = _LEAST_SHARE, [math.inf]
    for _ in range(MOST_GUESSES):
        guessed = plan(_with_guesses(found, slow, tried, share))
        if guessed.total_cost > (1 - _WORTH_TRYING) * made.total_cost:
            break
        wanted = {
            name: new
            for name, own in _chosen(guessed).items()
            if (new := own.intersection(slow) - tried.get(name, frozenset()))
        }
        if not wanted:
            break
        tried |= {name: tried.get(name, frozenset()) | new for name, new in wanted.items()}
        expected = {a.name: a.nmse for a in guessed.assignments}
        more = measure(sampled=True, only=wanted, others=False)
        seen += [
            share * p.nmse / expected[t.name]
            for t in more.tensors
            for p in t.points
            if p.format in wanted[t.name] and expected[t.name]
        ]
        if len(seen) > _ENOUGH_SEEN:
            share = max(share, min(seen))
        found = _joined(found, more)
        made = plan(found)
    return found, made


def _with_guesses(
    measurement: Measurement, names: Sequence[str], but: Formats, share: float
) -> Measurement:
    """Return it with points of these formats, of the least error to expect, but those named."""
    tensors = tuple(
        with_least_errors(t, [n for n in names if n not in but.get(t.name, ())], share)
        for t in measurement.tensors
    )
    return measurement.model_copy(update={"tensors": tensors})


def _joined(measurement: Measurement, more: Measurement) -> Measurement:
    """Return it with the other one's points of the same tensors as well."""
    others = {t.name: t for t in more.tensors}
    tensors = []
    for tensor in measurement.tensors:
        if other := others.get(tensor.name):
            tensor = _with_both(tensor, tensor, other)
        tensors.append(tensor)
    return measurement.model_copy(update={"tensors": tuple(tensors)})


def with_least_errors(
    tensor: TensorMeasurement, names: Sequence[str], share: float = _LEAST_SHARE
) -> TensorMeasurement:
    """Return the tensor with points of these formats as well, of the least error to expect.

    That is a share of the errors of next larger formats, times 4 for every bit less.

    It has none of a format that suits no rows of it, or whose bytes no measured one has.
    """
    if tensor.kept is not None:
        return tensor
    n_weights, row_length = math.prod(tensor.shape), tensor.shape[0]
    known = [p for p in tensor.points if p.format != tensor.source_format]
    added = []
    for name in names:
        if name in tensor.excluded or not formats.suits(name, row_length):
            continue
        n_bytes = formats.row_bytes(name, row_length) * (n_weights // row_length)
        errors = [
            share * p.nmse * 4.0 ** (8 * (p.n_bytes - n_bytes) / n_weights)
            for p in known
            if p.n_bytes >= n_bytes
        ]
        if errors:
            added.append(Point(name, n_bytes, min(errors), 0.0))
    return _with_points(tensor, (*tensor.points, *added), tensor.excluded)


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
                tensor = _with_both(tensor, before, tensor)
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


def _with_both(
    tensor: TensorMeasurement, before: TensorMeasurement, after: TensorMeasurement
) -> TensorMeasurement:
    """Return the tensor with the points of both; of a format that both have, the later one."""
    points = {p.format: p for p in (*before.points, *after.points)}
    return _with_points(tensor, tuple(points.values()), {**before.excluded, **after.excluded})


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
