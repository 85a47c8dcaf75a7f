"""What a plan may choose from: the candidates of every tensor, grouped into a knapsack's items.

Allocation, the frontier and explanations all start from the same Problem.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ramgguf.core.errors import PlanError
from ramgguf.core.units import format_count
from ramgguf.gguf.identity import unsure
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.knapsack import Choice
from ramgguf.plan.objectives import Cost
from ramgguf.plan.result import Assignment, Constraints, Pin
from ramgguf.plan.targets import TIES, runs, target_note
from ramgguf.quants import formats


def parse_tie(text: str) -> tuple[str, ...]:
    """Return the roles that a shorthand of TIES, or a comma-separated list, stands for."""
    roles = TIES.get(text) or tuple(r.strip() for r in text.split(",") if r.strip())
    if len(set(roles)) < 2:
        raise PlanError(
            f"tie {text!r} names fewer than two roles; write {', '.join(TIES)} or role,role"
        )
    return roles


@dataclass(frozen=True)
class Barred:
    """A format that was measured and may not be chosen, and why; `floor` if by the SQNR floor."""

    format: str
    reason: str
    floor: bool = False


@dataclass(frozen=True)
class Candidates:
    """What one tensor may take; note says why there is no choice, pin is the one that binds it."""

    tensor: TensorMeasurement
    points: tuple[Point, ...]
    barred: tuple[Barred, ...]
    note: str | None
    pin: Pin | None = None


@dataclass(frozen=True)
class Group:
    """Tensors that take one format together; a tensor on its own is a group of one.

    members are indices of the measurement's tensors. choices[j] holds bytes (padded as in the
    file) and cost of all members at points[j], which has one Point per member; costs[j] are theirs.
    """

    members: tuple[int, ...]
    choices: tuple[Choice, ...]
    points: tuple[tuple[Point, ...], ...]
    costs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack with the names of what is packed."""

    measurement: Measurement
    constraints: Constraints
    candidates: tuple[Candidates, ...]
    groups: tuple[Group, ...]
    cost: Cost

    @classmethod
    def of(cls, measurement: Measurement, constraints: Constraints, cost: Cost) -> "Problem":
        """Return the problem; raises PlanError when a constraint suits nothing."""
        _check_names(measurement, constraints)
        _check_minimums(measurement, constraints)
        pins = [_pin(t, constraints) for t in measurement.tensors]
        _check_pins(measurement, constraints, pins)
        candidates = tuple(
            _candidates(t, constraints, pin)
            for t, pin in zip(measurement.tensors, pins, strict=True)
        )
        tied = _tied(measurement, candidates, constraints.ties)
        _check_ties(measurement, constraints, tied)
        groups = tuple(
            _group(members, [candidates[i] for i in members], measurement.alignment, cost)
            for members in tied
        )
        return cls(measurement, constraints, candidates, groups, cost)

    @property
    def items(self) -> list[tuple[Choice, ...]]:
        return [g.choices for g in self.groups]

    def assignments(self, chosen: Sequence[int]) -> tuple[Assignment, ...]:
        """Return every tensor's assignment, given the index chosen for each group."""
        made: dict[int, Assignment] = {}
        for group, j in zip(self.groups, chosen, strict=True):
            for i, point, cost in zip(group.members, group.points[j], group.costs[j], strict=True):
                made[i] = _assignment(self.candidates[i], point, cost)
        return tuple(made[i] for i in range(len(self.candidates)))


def _assignment(candidates: Candidates, point: Point, cost: float) -> Assignment:
    tensor = candidates.tensor
    return Assignment(
        name=tensor.name,
        role=tensor.role,
        source_format=tensor.source_format,
        format=point.format,
        n_weights=tensor.n_weights,
        n_bytes=point.n_bytes,
        nmse=point.nmse,
        cost=cost,
        note=candidates.note,
        is_exact=point.format == tensor.grid,
    )


def _point_cost(candidates: Candidates, point: Point, cost: Cost) -> float:
    """Return the cost of a tensor at a point; what is never quantized costs nothing."""
    return 0.0 if candidates.tensor.kept is not None else cost(candidates.tensor, point)


def _check_names(measurement: Measurement, constraints: Constraints) -> None:
    measured = set(measurement.formats) | {t.source_format for t in measurement.tensors}
    asked = set(constraints.formats or ()) | {pin.format for pin in constraints.pins}
    if unknown := sorted(asked - measured):
        raise PlanError(
            f"{', '.join(unknown)} was not measured; measured are {', '.join(sorted(measured))}"
        )


def _pin(tensor: TensorMeasurement, constraints: Constraints) -> Pin | None:
    """Return the first pin that matches the tensor's name."""
    return next((p for p in constraints.pins if re.search(p.pattern, tensor.name)), None)


def _check_pins(
    measurement: Measurement, constraints: Constraints, pins: Sequence[Pin | None]
) -> None:
    """Raise PlanError for a pin that matches nothing, or only what keeps another format."""
    tensors = measurement.tensors
    binding = {pin for t, pin in zip(tensors, pins, strict=True) if t.kept is None}
    for pin in (p for p in constraints.pins if p not in binding):
        matched = [t for t in tensors if re.search(pin.pattern, t.name)]
        if not matched:
            raise PlanError(f"pin {pin.pattern!r} matches no tensor")
        if all(t.kept is not None and t.source_format != pin.format for t in matched):
            first = matched[0]
            raise PlanError(
                f"pin {pin.pattern!r} matches only what is never quantized: {first.name} cannot be "
                f"pinned to {pin.format}: {first.kept}"
            )


def _roles(measurement: Measurement) -> list[str]:
    """Return the roles of the tensors that may be quantized."""
    return sorted({t.role for t in measurement.tensors if t.kept is None})


def _check_minimums(measurement: Measurement, constraints: Constraints) -> None:
    """Raise PlanError for a minimum of a role that no tensor has which may be quantized."""
    roles = _roles(measurement)
    for least in constraints.min_formats:
        if least.role not in roles:
            raise PlanError(
                f"there is no role {least.role!r} among the tensors that are quantized; their "
                f"roles are {', '.join(roles)}"
            )


def _check_ties(
    measurement: Measurement, constraints: Constraints, groups: Sequence[tuple[int, ...]]
) -> None:
    """Raise PlanError for a tie that ties nothing, or names a role that nothing has."""
    roles = _roles(measurement)
    bound = [
        {measurement.tensors[i].role for i in members} for members in groups if len(members) > 1
    ]
    for k, tie in enumerate(constraints.ties):
        text = ",".join(tie)
        unknown = [role for role in tie if role not in roles]
        if len(tie) - len(unknown) < 2:
            raise PlanError(
                f"tie {text} suits fewer than two of the roles {', '.join(roles)}, which are those "
                "of the tensors that are quantized"
            )
        if unknown and tie not in TIES.values():
            raise PlanError(
                f"tie {text} names {', '.join(unknown)}, which no tensor that is quantized is; "
                f"their roles are {', '.join(roles)}"
            )
        earlier = {role for other in constraints.ties[:k] for role in other}
        if not any(found <= set(tie) - earlier for found in bound):
            raise PlanError(
                f"tie {text} has no effect: no layer has two tensors of these roles"
                + (" that an earlier tie leaves" if earlier & set(tie) else "")
            )


def _candidates(tensor: TensorMeasurement, constraints: Constraints, pin: Pin | None) -> Candidates:
    if tensor.kept is not None:
        return Candidates(tensor, tensor.points, (), tensor.kept)
    if pin is not None:
        points = tuple(p for p in tensor.points if p.format == pin.format)
        if not points:
            reason = tensor.excluded.get(pin.format, "it was not measured for this tensor")
            raise PlanError(f"{tensor.name} cannot be pinned to {pin.format}: {reason}")
        return Candidates(tensor, points, (), f"pinned to {pin.format}", pin)
    verdicts = [(p, _barred(tensor, p, constraints)) for p in tensor.points]
    target = constraints.target
    if any(barred is None and runs(target, p.format) for p, barred in verdicts):
        why = f"{target} does not run it"
        verdicts = [
            (p, barred or (None if runs(target, p.format) else Barred(p.format, why)))
            for p, barred in verdicts
        ]
    exact = next((p for p, barred in verdicts if p.format == tensor.grid and not barred), None)
    if exact is not None:
        why = f"the weights lie on the grid of {exact.format}, which holds them exactly"
        verdicts = [
            (p, barred or (Barred(p.format, why) if p.n_bytes > exact.n_bytes else None))
            for p, barred in verdicts
        ]
    return Candidates(
        tensor,
        tuple(p for p, barred in verdicts if barred is None),
        tuple(barred for _, barred in verdicts if barred is not None),
        None,
    )


def _barred(tensor: TensorMeasurement, point: Point, constraints: Constraints) -> Barred | None:
    """Return why the constraints forbid the point; the source's own format is always allowed."""
    if point.format == tensor.source_format:
        return None
    asked = constraints.formats
    if asked is not None and point.format not in asked:
        is_left = not formats.any_suits(asked, tensor.row_length)
        if not (is_left and point.format in formats.HALVES):
            return Barred(point.format, "not among the formats asked for")
    for least in constraints.min_formats if point.format != tensor.grid else ():
        bits = 8 * point.n_bytes / tensor.n_weights
        if least.role == tensor.role and bits < formats.get(least.format).bpw - 1e-3:
            return Barred(point.format, f"fewer bits than {least.format}, the role's minimum")
    if point.sqnr_db < constraints.min_sqnr_db:
        reason = f"SQNR {point.sqnr_db:.1f} dB is below the floor of {constraints.min_sqnr_db:g} dB"
        return Barred(point.format, reason, floor=True)
    return None


def _tied(
    measurement: Measurement,
    candidates: Sequence[Candidates],
    ties: Sequence[tuple[str, ...]],
) -> list[tuple[int, ...]]:
    """Return the members of every group, in the order of their first tensors."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (tensor, c) in enumerate(zip(measurement.tensors, candidates, strict=True)):
        tie = next((k for k, roles in enumerate(ties) if tensor.role in roles), None)
        alone = tie is None or c.tensor.kept is not None
        key = (i,) if alone or tie is None else (tie, -1 if tensor.layer is None else tensor.layer)
        groups.setdefault((*key, int(alone)), []).append(i)
    return [tuple(members) for members in groups.values()]


def _group(
    members: tuple[int, ...], candidates: Sequence[Candidates], alignment: int, cost: Cost
) -> Group:
    if len(members) == 1:
        return _group_of_one(members, candidates[0], alignment, cost)
    by_format = [{p.format: p for p in c.points} for c in candidates]
    common = [p.format for p in candidates[0].points if all(p.format in d for d in by_format)]
    if not common:
        names = ", ".join(c.tensor.name for c in candidates)
        raise PlanError(f"{names} are tied, and no format is allowed for all of them; untie them")
    points = tuple(tuple(d[name] for d in by_format) for name in common)
    costs = tuple(
        tuple(_point_cost(c, p, cost) for c, p in zip(candidates, row, strict=True))
        for row in points
    )
    choices = tuple(
        Choice(sum(padded(p.n_bytes, alignment) for p in row), math.fsum(shares))
        for row, shares in zip(points, costs, strict=True)
    )
    return Group(members, choices, points, costs)


def _group_of_one(
    members: tuple[int, ...], candidates: Candidates, alignment: int, cost: Cost
) -> Group:
    points = candidates.points
    costs = [_point_cost(candidates, p, cost) for p in points]
    choices = tuple(
        Choice(padded(p.n_bytes, alignment), c) for p, c in zip(points, costs, strict=True)
    )
    return Group(members, choices, tuple((p,) for p in points), tuple((c,) for c in costs))


def notes(problem: Problem) -> list[str]:
    """Return what the floor and the tensors' shapes kept out, for the plan's reader."""
    lines = list(unsure("the measurement", problem.measurement.source))
    lines.extend(_idle(problem))
    constraints = problem.constraints
    if constraints.target is not None:
        lines.extend(target_note(constraints.target, constraints.ties))
        lines.extend(_not_run(problem, constraints.target))
    below = Counter(b.format for c in problem.candidates for b in c.barred if b.floor)
    if below:
        excluded = ", ".join(f"{name} for {n}" for name, n in below.most_common())
        floor = problem.constraints.min_sqnr_db
        lines.append(f"the floor of {floor:g} dB excludes {excluded} tensors")
    unsuited: Counter[tuple[str, str]] = Counter()
    for c in problem.candidates:
        for name, why in c.tensor.excluded.items():
            unsuited[(name, why)] += 1
    by_why: dict[str, list[str]] = {}
    for (name, why), n in unsuited.items():
        by_why.setdefault(f"no candidate for {format_count(n, 'tensor')}, {why}", []).append(name)
    lines.extend(f"{', '.join(names)}: {what}" for what, names in by_why.items())
    kept = Counter(c.tensor.kept for c in problem.candidates if c.tensor.kept is not None)
    lines.extend(
        f"kept as they are: {format_count(n, 'tensor')}, {why}" for why, n in kept.most_common()
    )
    lines.extend(n for n in problem.measurement.notes if n not in lines)
    return lines


def _not_run(problem: Problem, target: str) -> Iterator[str]:
    """Yield which formats the target does not run: those left out, and those without a choice."""
    barred = {b.format for c in problem.candidates for b in c.barred}
    if left_out := sorted(name for name in barred if not runs(target, name)):
        yield f"for {target}, which does not run them, left out: {', '.join(left_out)}"
    stuck = [c for c in problem.candidates if not any(runs(target, p.format) for p in c.points)]
    if stuck:
        first = stuck[0]
        yield (
            f"{target} does not run the file: no format that it runs for "
            f"{format_count(len(stuck), 'tensor')}, {first.tensor.name} in "
            f"{first.points[0].format} first"
        )


def _idle(problem: Problem) -> Iterator[str]:
    """Yield which constraints changed nothing, though what they name is there."""
    constraints = problem.constraints
    free = [c for c in problem.candidates if c.tensor.kept is None]
    binding = {c.pin for c in free}
    for pin in (p for p in constraints.pins if p not in binding):
        yield f"pin {pin.pattern}={pin.format} has no effect: what it matches is bound without it"
    for least in constraints.min_formats:
        if all(c.pin is not None for c in free if c.tensor.role == least.role):
            yield f"--min-format {least.role}={least.format} has no effect: all are pinned"
    for name in constraints.formats or ():
        if not any(p.format == name for c in free for p in c.tensor.points):
            yield f"{name} suits no tensor, so that --formats {name} has no effect"
