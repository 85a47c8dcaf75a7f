"""The whole frontier at once: the best plan of every size, from one sort.

Each group of tensors has a lower convex hull of (bytes, cost). Taking the hulls' steps in the order
of what a byte buys gives every solution of the Lagrangian relaxation, and each of these is the
optimum of its own size. Sizes between two of them are filled up, with a proven gap
(Sinha and Zoltners, The multiple-choice knapsack problem, Operations Research 27, 1979).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.core.units import format_bytes
from ramgguf.measure.result import Measurement
from ramgguf.plan.division import Sites
from ramgguf.plan.frontier_result import (
    Frontier,
    FrontierChoice,
    FrontierGroup,
    FrontierStep,
    FrontierTensor,
    ends_before,
)
from ramgguf.plan.knapsack import hull
from ramgguf.plan.objectives import Costing
from ramgguf.plan.pools import UNLIMITED, Pools
from ramgguf.plan.prediction import predicted_kld
from ramgguf.plan.problem import Group, Problem, notes
from ramgguf.plan.result import Assignment, Constraints, Division, Plan, PredictedKLD

MAX_BPW = 8.5
# A knee: over the KNEE_WINDOW of bytes before it, a byte lowered the cost, in relation to the
# cost, at least KNEE_RATIO times as much as over the same number of bytes after it.
KNEE_WINDOW = 0.04
KNEE_RATIO = 1.25


def frontier(
    measurement: Measurement,
    *,
    costing: Costing,
    constraints: Constraints,
    max_bpw: float = MAX_BPW,
) -> Frontier:
    """Return the best plans of all sizes, from the smallest the constraints allow to max_bpw."""
    problem = Problem.of(measurement, constraints, costing.cost)
    groups = tuple(_group(g) for g in problem.groups)
    start_bytes = measurement.n_overhead_bytes + sum(g.choices[0].n_bytes for g in groups)
    start_cost = float(sum(g.choices[0].cost for g in groups))
    limit = measurement.n_overhead_bytes + max_bpw * measurement.n_weights / 8
    steps, end_price = _steps(groups, start_bytes, start_cost, limit)
    return Frontier(
        ramgguf_version=measurement.ramgguf_version,
        source=measurement.source,
        encoder=measurement.encoder,
        imatrix=measurement.imatrix,
        objective=costing.name,
        sensitivity_sha256=costing.sensitivity_sha256,
        constraints=constraints,
        n_overhead_bytes=measurement.n_overhead_bytes,
        tensors=tuple(
            FrontierTensor(
                name=c.tensor.name,
                role=c.tensor.role,
                source_format=c.tensor.source_format,
                n_weights=c.tensor.n_weights,
                grid=c.tensor.grid,
                note=c.note,
                alpha=costing.alpha.get(c.tensor.name),
                relative_error=costing.errors.get(c.tensor.name),
                late=costing.late.get(c.tensor.name),
            )
            for c in problem.candidates
        ),
        groups=groups,
        start_bytes=start_bytes,
        start_cost=start_cost,
        steps=steps,
        end_price=end_price,
        knees=knees(start_bytes, start_cost, steps),
        notes=(*notes(problem), *costing.notes),
    )


def _group(group: Group) -> FrontierGroup:
    return FrontierGroup(
        members=group.members,
        choices=tuple(
            FrontierChoice(
                format=group.points[j][0].format,
                n_bytes=group.choices[j].n_bytes,
                cost=group.choices[j].cost,
                tensor_bytes=tuple(p.n_bytes for p in group.points[j]),
                tensor_nmse=tuple(p.nmse for p in group.points[j]),
                tensor_cost=group.costs[j],
            )
            for j in hull(group.choices)
        ),
    )


def _steps(
    groups: Sequence[FrontierGroup], n_bytes: int, cost: float, limit: float
) -> tuple[tuple[FrontierStep, ...], float]:
    """Return the steps up to the limit by falling price, and the price of the first beyond it."""
    rises = [
        ((a.cost - b.cost) / (b.n_bytes - a.n_bytes), i, j, b.n_bytes - a.n_bytes, b.cost - a.cost)
        for i, group in enumerate(groups)
        for j, (a, b) in enumerate(zip(group.choices, group.choices[1:], strict=False), start=1)
    ]
    steps: list[FrontierStep] = []
    for price, i, j, extra, change in sorted(rises, key=lambda r: (-r[0], r[1], r[2])):
        n_bytes, cost = n_bytes + extra, max(0.0, cost + change)
        if n_bytes > limit:
            return tuple(steps), price
        steps.append(FrontierStep(group=i, choice=j, n_bytes=n_bytes, cost=cost, price=price))
    return tuple(steps), 0.0


def knees(start_bytes: int, start_cost: float, steps: Sequence[FrontierStep]) -> tuple[int, ...]:
    """Return the steps after which a byte buys clearly less than before it, in relative cost."""
    n_bytes = np.array([start_bytes, *(s.n_bytes for s in steps)], np.float64)
    cost = np.array([start_cost, *(s.cost for s in steps)], np.float64)
    n_bytes, cost = n_bytes[cost > 0], np.log(cost[cost > 0])
    inside = np.flatnonzero(
        (n_bytes * (1 - KNEE_WINDOW) >= n_bytes[0]) & (n_bytes * (1 + KNEE_WINDOW) <= n_bytes[-1])
    )
    if not len(inside):
        return ()
    here = cost[inside]
    before = np.interp(n_bytes[inside] * (1 - KNEE_WINDOW), n_bytes, cost) - here
    after = here - np.interp(n_bytes[inside] * (1 + KNEE_WINDOW), n_bytes, cost)
    ratio = before / np.maximum(after, 1e-12)
    return tuple(int(inside[k]) - 1 for k in _peaks(n_bytes[inside], ratio))


def _peaks(n_bytes: NDArray[np.float64], ratio: NDArray[np.float64]) -> list[int]:
    """Return where the ratio is at its largest within the window, and large enough."""
    peaks: list[int] = []
    for k in np.argsort(-ratio, kind="stable"):
        if ratio[k] < KNEE_RATIO:
            break
        if all(abs(n_bytes[k] - n_bytes[p]) > KNEE_WINDOW * n_bytes[p] for p in peaks):
            peaks.append(int(k))
    return sorted(peaks)


def plan_at(
    frontier: Frontier,
    budget: int,
    pools: Pools | None = None,
    projector: Measurement | None = None,
) -> Plan:
    """Return the frontier's plan for a budget, with its proven gap, without solving again.

    With pools, it goes as far as a division fits both memories, in whatever formats the frontier
    has. Raises BudgetError below the frontier's start, PlanError for a projector to plan as well.
    """
    if projector is not None:
        raise PlanError("a frontier is of one model; plan a projector with it from measurements")
    if budget < frontier.start_bytes:
        raise BudgetError(
            f"budget {format_bytes(budget)} is below the frontier's start, "
            f"{format_bytes(frontier.start_bytes)} ({frontier.start_bytes} bytes)",
            smallest=frontier.start_bytes,
        )
    chosen, n_bytes = [0] * len(frontier.groups), frontier.start_bytes
    divided = None if pools is None else _Divided(frontier, pools)
    bound: float | None = None
    for step in frontier.steps:
        group = frontier.groups[step.group]
        extra = group.choices[step.choice].n_bytes - group.choices[step.choice - 1].n_bytes
        fits = n_bytes + extra <= budget and chosen[step.group] == step.choice - 1
        fits = fits and (divided is None or divided.take(step.group, step.choice))
        if not fits and bound is None:
            # Up to here the plan is optimal; no plan can buy more per byte than the next step.
            bound = _cost(frontier, chosen) - step.price * (budget - n_bytes)
        if fits:
            chosen[step.group], n_bytes = step.choice, n_bytes + extra
    cost = _cost(frontier, chosen)
    if bound is None:
        bound = cost - frontier.end_price * (budget - n_bytes)
    assignments = _assignments(frontier, chosen)
    gap = max(0.0, 1 - max(0.0, bound) / cost) if cost > 0 else 0.0
    notes = frontier.notes
    if ends_before(frontier, budget):
        end = f"{frontier.bpw(frontier.end_bytes):.2f} bpw"
        more = "plans from the measurement use more of the budget"
        notes = (*notes, f"the frontier ends at {end}; {more}")
    return Plan(
        ramgguf_version=frontier.ramgguf_version,
        source=frontier.source,
        encoder=frontier.encoder,
        imatrix=frontier.imatrix,
        objective=frontier.objective,
        budget=budget,
        n_bytes=n_bytes,
        n_overhead_bytes=frontier.n_overhead_bytes,
        total_cost=cost,
        predicted_kld=_predicted_kld(frontier, assignments),
        sensitivity_sha256=frontier.sensitivity_sha256,
        gap=gap,
        constraints=frontier.constraints,
        assignments=assignments,
        division=None if divided is None else divided.division(),
        notes=notes,
    )


class _Divided:
    """What a frontier's plan takes of both memories in each division, as it grows."""

    def __init__(self, frontier: Frontier, pools: Pools) -> None:
        self._groups, self._rooms = frontier.groups, pools.rooms
        names = [t.name for t in frontier.tensors]
        sites = Sites.of(names, pools.n_layers, tied=pools.tied)
        self._lies = np.array(
            [[sites.in_ram(r.division), sites.in_vram(r.division)] for r in pools.rooms], np.int64
        )
        n_weights = np.array([t.n_weights for t in frontier.tensors])
        self._n_offloaded = self._lies[:, 1] @ n_weights
        self._left = np.array(
            [[UNLIMITED if n is None else n for n in (r.ram, r.vram)] for r in pools.rooms],
            np.int64,
        )
        for group in frontier.groups:
            self._left -= self._taken(group, 0)
        if not self._fits(self._left).any():
            raise BudgetError(
                "no division between RAM and GPU leaves enough for the frontier's start, "
                f"{frontier.start_bytes} bytes",
                smallest=frontier.start_bytes,
            )

    def _taken(self, group: FrontierGroup, choice: int) -> NDArray[np.int64]:
        """Return the bytes of RAM and of the GPU that a choice takes in each division."""
        sizes = np.array(group.choices[choice].tensor_bytes, np.int64)
        taken: NDArray[np.int64] = self._lies[:, :, list(group.members)] @ sizes
        return taken

    def _fits(self, left: NDArray[np.int64]) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = np.all(left >= 0, axis=1)
        return found

    def take(self, group: int, choice: int) -> bool:
        """Take a group's next choice if a division then fits; return whether it was taken."""
        more = self._taken(self._groups[group], choice)
        left = self._left - more + self._taken(self._groups[group], choice - 1)
        if not self._fits(left).any():
            return False
        self._left = left
        return True

    def division(self) -> Division:
        """Return the division that fits with the most weights on the GPU."""
        offloaded = np.where(self._fits(self._left), self._n_offloaded, -1)
        return self._rooms[int(np.argmax(offloaded))].division


def _cost(frontier: Frontier, chosen: Sequence[int]) -> float:
    return float(sum(g.choices[j].cost for g, j in zip(frontier.groups, chosen, strict=True)))


def _predicted_kld(frontier: Frontier, assignments: Sequence[Assignment]) -> PredictedKLD | None:
    alpha = {t.name: t.alpha for t in frontier.tensors if t.alpha is not None}
    errors = {t.name: t.relative_error or 0.0 for t in frontier.tensors}
    late = {t.name: t.late for t in frontier.tensors if t.late is not None}
    return predicted_kld(assignments, alpha, errors, late, frontier.encoder)


def _assignments(frontier: Frontier, chosen: Sequence[int]) -> tuple[Assignment, ...]:
    made: dict[int, Assignment] = {}
    for group, j in zip(frontier.groups, chosen, strict=True):
        choice = group.choices[j]
        for k, member in enumerate(group.members):
            tensor = frontier.tensors[member]
            made[member] = Assignment(
                name=tensor.name,
                role=tensor.role,
                source_format=tensor.source_format,
                format=choice.format,
                n_weights=tensor.n_weights,
                n_bytes=choice.tensor_bytes[k],
                nmse=choice.tensor_nmse[k],
                cost=choice.tensor_cost[k],
                note=tensor.note,
                is_exact=choice.format == tensor.grid,
            )
    return tuple(made[i] for i in range(len(frontier.tensors)))
