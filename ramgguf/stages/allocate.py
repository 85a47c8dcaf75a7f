"""From a Measurement and a budget to a Plan."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.errors import BudgetError, PlanError
from ramgguf.gguf_layout import padded
from ramgguf.knapsack import Choice, Solution, smallest, solve
from ramgguf.objectives import Shape, objective
from ramgguf.schema import (
    Assignment,
    Measurement,
    NextPercent,
    Plan,
    Point,
    TensorMeasurement,
)
from ramgguf.units import format_bytes


@dataclass(frozen=True)
class Pin:
    """Tensors whose name the pattern matches (re.search) must take this format."""

    pattern: str
    format: str

    @classmethod
    def parse(cls, text: str) -> "Pin":
        """Return the pin that 'regex=FORMAT' stands for; raises PlanError otherwise."""
        pattern, equals, name = text.rpartition("=")
        if not (equals and pattern and name):
            raise PlanError(f"pin {text!r} is not of the form 'regex=FORMAT'")
        try:
            re.compile(pattern)
        except re.error as e:
            raise PlanError(f"pin {text!r}: {pattern!r} is not a regular expression: {e}") from None
        return cls(pattern, name.upper())


@dataclass(frozen=True)
class Constraints:
    """What a plan must respect; formats None allows every measured one."""

    min_sqnr_db: float = 9.0
    formats: frozenset[str] | None = None
    pins: tuple[Pin, ...] = ()


@dataclass(frozen=True)
class _Candidates:
    tensor: TensorMeasurement
    points: tuple[Point, ...]
    below_floor: tuple[str, ...]
    note: str | None


def allocate(
    measurement: Measurement,
    budget: int,
    *,
    objective_name: str = "weighted",
    constraints: Constraints = Constraints(),
) -> Plan:
    """Return the plan of least cost whose output file has at most `budget` bytes.

    Raises BudgetError with the smallest feasible size when there is none, PlanError when a pin or
    a format matches nothing.
    """
    _check_names(measurement, constraints)
    candidates = [_candidates(t, constraints) for t in measurement.tensors]
    items = _items(measurement, candidates, objective_name)
    capacity = budget - measurement.n_overhead_bytes
    if smallest(items) > capacity:
        raise _too_small(measurement, budget, constraints, candidates)
    solution = solve(items, capacity)
    return Plan(
        ramgguf_version=measurement.ramgguf_version,
        source=measurement.source,
        encoder=measurement.encoder,
        objective=objective_name,
        budget=budget,
        n_bytes=measurement.n_overhead_bytes + solution.n_bytes,
        n_overhead_bytes=measurement.n_overhead_bytes,
        total_cost=solution.cost,
        gap=solution.gap,
        min_sqnr_db=constraints.min_sqnr_db,
        assignments=tuple(
            _assignment(c, j, item[j])
            for c, item, j in zip(candidates, items, solution.chosen, strict=True)
        ),
        next_percent=_next_percent(items, solution, capacity, budget),
        notes=tuple(_notes(candidates, constraints)),
    )


def _check_names(measurement: Measurement, constraints: Constraints) -> None:
    measured = set(measurement.formats) | {t.source_format for t in measurement.tensors}
    asked = set(constraints.formats or ()) | {pin.format for pin in constraints.pins}
    if unknown := sorted(asked - measured):
        raise PlanError(
            f"{', '.join(unknown)} was not measured; measured are {', '.join(sorted(measured))}"
        )
    for pin in constraints.pins:
        if not any(re.search(pin.pattern, t.name) for t in measurement.tensors):
            raise PlanError(f"pin {pin.pattern!r} matches no tensor")


def _candidates(tensor: TensorMeasurement, constraints: Constraints) -> _Candidates:
    pin = next((p for p in constraints.pins if re.search(p.pattern, tensor.name)), None)
    if tensor.kept is not None:
        if pin is not None and pin.format != tensor.source_format and pin.pattern == tensor.name:
            raise PlanError(f"{tensor.name} cannot be pinned to {pin.format}: {tensor.kept}")
        return _Candidates(tensor, tensor.points, (), tensor.kept)
    if pin is not None:
        points = tuple(p for p in tensor.points if p.format == pin.format)
        if not points:
            reason = tensor.excluded.get(pin.format, "it was not measured for this tensor")
            raise PlanError(f"{tensor.name} cannot be pinned to {pin.format}: {reason}")
        return _Candidates(tensor, points, (), f"pinned to {pin.format}")
    allowed = constraints.formats
    points = tuple(
        p
        for p in tensor.points
        if allowed is None or p.format in allowed or p.format == tensor.source_format
    )
    safe = tuple(p for p in points if p.sqnr_db >= constraints.min_sqnr_db)
    below = tuple(p.format for p in points if p.sqnr_db < constraints.min_sqnr_db)
    return _Candidates(tensor, safe, below, None)


def _items(
    measurement: Measurement, candidates: Sequence[_Candidates], objective_name: str
) -> list[list[Choice]]:
    cost = objective(objective_name)
    shape = Shape.of(measurement)
    return [
        [
            Choice(
                padded(p.n_bytes, measurement.alignment),
                0.0 if c.tensor.kept is not None else cost(c.tensor, p, shape),
            )
            for p in c.points
        ]
        for c in candidates
    ]


def _assignment(candidates: _Candidates, index: int, choice: Choice) -> Assignment:
    tensor, point = candidates.tensor, candidates.points[index]
    return Assignment(
        name=tensor.name,
        role=tensor.role,
        source_format=tensor.source_format,
        format=point.format,
        n_weights=tensor.n_weights,
        n_bytes=point.n_bytes,
        nmse=point.nmse,
        cost=choice.cost,
        note=candidates.note,
    )


def _next_percent(
    items: list[list[Choice]], solution: Solution, capacity: int, budget: int
) -> NextPercent:
    larger = solve(items, capacity + budget // 100, seconds=5.0)
    changes = sum(a != b for a, b in zip(solution.chosen, larger.chosen, strict=True))
    return NextPercent(n_bytes=budget + budget // 100, total_cost=larger.cost, n_changes=changes)


def _notes(candidates: Sequence[_Candidates], constraints: Constraints) -> list[str]:
    notes = []
    below = Counter(name for c in candidates for name in c.below_floor)
    if below:
        excluded = ", ".join(f"{name} for {n}" for name, n in below.most_common())
        notes.append(f"the floor of {constraints.min_sqnr_db:g} dB excludes {excluded} tensors")
    unsuited: Counter[tuple[str, str]] = Counter()
    for c in candidates:
        for name, why in c.tensor.excluded.items():
            unsuited[(name, why)] += 1
    by_why: dict[str, list[str]] = {}
    for (name, why), n in unsuited.items():
        by_why.setdefault(f"no candidate for {n} tensors, {why}", []).append(name)
    notes.extend(f"{', '.join(names)}: {what}" for what, names in by_why.items())
    return notes


def _too_small(
    measurement: Measurement,
    budget: int,
    constraints: Constraints,
    candidates: Sequence[_Candidates],
) -> BudgetError:
    """Return the error that says what would fit, with and without the floor, and what blocks it."""

    def least(chosen: Sequence[_Candidates]) -> int:
        return measurement.n_overhead_bytes + sum(
            padded(min(p.n_bytes for p in c.points), measurement.alignment) for c in chosen
        )

    without = Constraints(-1e9, constraints.formats, constraints.pins)
    safe, bare = least(candidates), least([_candidates(c.tensor, without) for c in candidates])
    message = (
        f"budget {format_bytes(budget)} ({budget} bytes) is below the smallest plan, "
        f"{format_bytes(safe)} ({safe} bytes)"
    )
    if bare < safe:
        message += (
            f"; without the floor of {constraints.min_sqnr_db:g} dB it is "
            f"{format_bytes(bare)} ({bare} bytes)"
        )
    blocking = sorted(candidates, key=lambda c: -min(p.n_bytes for p in c.points))[:3]
    held = [f"{c.tensor.name} {format_bytes(min(p.n_bytes for p in c.points))}" for c in blocking]
    kept = sum(c.tensor.n_bytes for c in candidates if c.tensor.kept is not None)
    message += (
        f". The largest tensors at their smallest are {', '.join(held)}; "
        f"tensors that are never quantized take {format_bytes(kept)}, the header "
        f"{format_bytes(measurement.n_overhead_bytes)}. Raise --budget, lower --min-sqnr, "
        "drop pins or allow more formats with --formats"
    )
    return BudgetError(message)
