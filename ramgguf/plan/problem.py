"""What a plan may choose from: the candidates of every tensor, grouped into a knapsack's items.

Allocation, the frontier and explanations all start from the same Problem.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.core.errors import PlanError
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.knapsack import Choice
from ramgguf.plan.objectives import Cost
from ramgguf.plan.result import Assignment, Constraints
from ramgguf.quants import formats

# Shorthands of --tie: what fused kernels want in one format.
TIES = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "gate-up": ("ffn_gate", "ffn_up"),
    "gate-up-exps": ("ffn_gate_exps", "ffn_up_exps"),
    "gate-up-shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
}


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
    """What one tensor may take; note says why there is no choice."""

    tensor: TensorMeasurement
    points: tuple[Point, ...]
    barred: tuple[Barred, ...]
    note: str | None


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
        candidates = tuple(_candidates(t, constraints) for t in measurement.tensors)
        groups = tuple(
            _group(members, [candidates[i] for i in members], measurement.alignment, cost)
            for members in _tied(measurement, candidates, constraints.ties)
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
    for pin in constraints.pins:
        if not any(re.search(pin.pattern, t.name) for t in measurement.tensors):
            raise PlanError(f"pin {pin.pattern!r} matches no tensor")
    roles = {t.role for t in measurement.tensors}
    for role in (m.role for m in constraints.min_formats):
        if role not in roles:
            raise PlanError(f"there is no role {role!r}; roles are {', '.join(sorted(roles))}")
    for tie in constraints.ties:
        if len(roles & set(tie)) < 2:
            raise PlanError(
                f"tie {','.join(tie)} suits fewer than two of the roles {', '.join(sorted(roles))}"
            )


def _candidates(tensor: TensorMeasurement, constraints: Constraints) -> Candidates:
    pin = next((p for p in constraints.pins if re.search(p.pattern, tensor.name)), None)
    if tensor.kept is not None:
        if pin is not None and pin.format != tensor.source_format and pin.pattern == tensor.name:
            raise PlanError(f"{tensor.name} cannot be pinned to {pin.format}: {tensor.kept}")
        return Candidates(tensor, tensor.points, (), tensor.kept)
    if pin is not None:
        points = tuple(p for p in tensor.points if p.format == pin.format)
        if not points:
            reason = tensor.excluded.get(pin.format, "it was not measured for this tensor")
            raise PlanError(f"{tensor.name} cannot be pinned to {pin.format}: {reason}")
        return Candidates(tensor, points, (), f"pinned to {pin.format}")
    verdicts = [(p, _barred(tensor, p, constraints)) for p in tensor.points]
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
    if constraints.formats is not None and point.format not in constraints.formats:
        return Barred(point.format, "not among the formats asked for")
    for least in constraints.min_formats:
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
    told = []
    below = Counter(b.format for c in problem.candidates for b in c.barred if b.floor)
    if below:
        excluded = ", ".join(f"{name} for {n}" for name, n in below.most_common())
        floor = problem.constraints.min_sqnr_db
        told.append(f"the floor of {floor:g} dB excludes {excluded} tensors")
    unsuited: Counter[tuple[str, str]] = Counter()
    for c in problem.candidates:
        for name, why in c.tensor.excluded.items():
            unsuited[(name, why)] += 1
    by_why: dict[str, list[str]] = {}
    for (name, why), n in unsuited.items():
        by_why.setdefault(f"no candidate for {n} tensors, {why}", []).append(name)
    told.extend(f"{', '.join(names)}: {what}" for what, names in by_why.items())
    kept = Counter(c.tensor.kept for c in problem.candidates if c.tensor.kept is not None)
    told.extend(f"kept as they are: {n} tensors, {why}" for why, n in kept.most_common())
    return told
