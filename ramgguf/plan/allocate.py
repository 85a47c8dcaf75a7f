"""From a Measurement and a budget to a Plan."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.core.gc_paused import gc_paused
from ramgguf.core.units import MOST_BYTES, format_bytes
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement
from ramgguf.plan.drafts import draft_notes
from ramgguf.plan.knapsack import Solution, smallest, solve
from ramgguf.plan.objectives import Costing
from ramgguf.plan.pools import PooledProblem, Pools
from ramgguf.plan.problem import Candidates, Problem, notes
from ramgguf.plan.result import Assignment, Constraints, Division, NextPercent, Plan
from ramgguf.plan.speed import SpeedLimit, TimedProblem
from ramgguf.plan.together import (
    constraints_of_each,
    joined,
    projector_cost,
    require_projector,
    together_notes,
)

MAX_UNUSED = 0.001  # of the budget; what a plan leaves beyond it is explained


@gc_paused()
def allocate(
    measurement: Measurement,
    budget: int,
    *,
    costing: Costing,
    constraints: Constraints,
    speed: SpeedLimit | None = None,
    pools: Pools | None = None,
    projector: Measurement | None = None,
) -> Plan:
    """Return the plan of least cost whose output file has at most `budget` bytes.

    With a speed, it is the cheapest of those that are predicted to be as fast; with pools, of those
    that fit both memories; with a projector, both files have at most `budget` bytes, their costs
    have the least sum, and the plan has the projector's as `mmproj`. Raises BudgetError with the
    smallest feasible size, or the largest speed, when there is none, PlanError when a pin, a tie
    or a format suits nothing.
    """
    if speed is not None and pools is not None:
        raise PlanError("speeds are those of this CPU: a least speed does not go with a GPU's part")
    if projector is not None and pools is not None:
        raise PlanError("a projector is planned with its model in RAM only, not beside a GPU's")
    posed = _Posed.of(measurement, costing, constraints, projector)
    if projector is not None and speed is not None:
        speed = speed.without(t.name for t in projector.tensors)
    problem, capacity = posed.both, budget - posed.both.measurement.n_overhead_bytes
    if smallest(problem.items) > capacity:
        raise _too_small(problem, posed.without_floor(), budget)
    timed: TimedProblem | None = None
    best: Callable[[int], Solution] = partial(solve, problem.items)
    if speed is not None:
        timed = TimedProblem(problem, speed)
        bare = TimedProblem(posed.without_floor(), speed) if constraints.min_sqnr_db > 0 else None
        timed.require_reachable(capacity, bare)
        best = timed.solved
    division: Division | None = None
    pooled: PooledProblem | None = None
    if pools is not None:
        pooled = PooledProblem(problem, pools)
        solution, division = pooled.solved(capacity)
    else:
        solution = best(capacity)
    free = pools is None and (timed is None or not timed.binds(capacity, solution))
    unused = tuple(_unused(problem, solution, capacity, budget)) if free else ()
    assignments = problem.assignments(solution.chosen)
    own = assignments[: len(measurement.tensors)]
    made = _plan(
        posed.model,
        own,
        costing.name,
        solution,
        predicted_kld=costing.predicted_kld(own, measurement.encoder),
        sensitivity_sha256=costing.sensitivity_sha256,
        division=division,
        speed=None if timed is None else timed.planned(own),
        notes=(
            *(() if timed is None else timed.notes()),
            *(pooled.notes(division) if pooled and division else ()),
            *unused,
            *notes(posed.model),
            *draft_notes(measurement, own),
            *costing.notes,
        ),
    )
    if posed.projector is None:
        step = None if pools else _next_percent(best, solution, capacity, budget)
        exact = {"total_cost": solution.cost, "gap": solution.gap}
        return made.model_copy(update={**exact, "budget": budget, "next_percent": step})
    beside = _plan(
        posed.projector,
        assignments[len(own) :],
        costing.name,
        solution,
        notes=(*notes(posed.projector), *together_notes()),
    )
    return made.model_copy(update={"mmproj": beside})


@dataclass(frozen=True)
class _Posed:
    """The knapsack of a model, that of its projector if there is one, and the two as one."""

    model: Problem
    projector: Problem | None
    both: Problem

    @classmethod
    def of(
        cls,
        measurement: Measurement,
        costing: Costing,
        constraints: Constraints,
        projector: Measurement | None,
    ) -> "_Posed":
        if projector is None:
            model = Problem.of(measurement, constraints, costing.cost)
            return cls(model, None, model)
        require_projector(projector)
        own, others = constraints_of_each(constraints, measurement, projector)
        model = Problem.of(measurement, own, costing.cost)
        cost = projector_cost(costing, measurement, projector)
        beside = Problem.of(projector, others, cost)
        return cls(model, beside, joined(model, beside))

    def without_floor(self) -> Problem:
        """Return the problem of both with every SQNR allowed."""

        def bare(problem: Problem) -> Problem:
            constraints = problem.constraints.model_copy(update={"min_sqnr_db": -math.inf})
            return Problem.of(problem.measurement, constraints, problem.cost)

        model = bare(self.model)
        return model if self.projector is None else joined(model, bare(self.projector))


def _plan(
    problem: Problem,
    assignments: tuple[Assignment, ...],
    objective: str,
    solution: Solution,
    **others: Any,
) -> Plan:
    """Return the plan of one file of the problem that was solved; its budget is its own size.

    Where the solution is of two files, all that it may be too expensive by may be this one's.
    """
    measurement = problem.measurement
    data = sum(padded(a.n_bytes, measurement.alignment) for a in assignments)
    n_bytes, cost = measurement.n_overhead_bytes + data, math.fsum(a.cost for a in assignments)
    excess = solution.gap * solution.cost
    return Plan(
        ramgguf_version=measurement.ramgguf_version,
        source=measurement.source,
        encoder=measurement.encoder,
        imatrix=measurement.imatrix,
        objective=objective,
        budget=n_bytes,
        n_bytes=n_bytes,
        n_overhead_bytes=measurement.n_overhead_bytes,
        total_cost=cost,
        gap=min(1.0, excess / cost) if excess > 0 and cost > 0 else 0.0,
        constraints=problem.constraints,
        assignments=assignments,
        **others,
    )


def _unused(problem: Problem, solution: Solution, room: int, budget: int) -> Iterator[str]:
    """Yield why more than MAX_UNUSED of the budget is left, if it is."""
    left = room - solution.n_bytes
    if left <= MAX_UNUSED * budget:
        return
    said = f"{format_bytes(left)} of the budget are left: "
    better = [
        (choice.n_bytes - now.n_bytes, group, j)
        for group, k in zip(problem.groups, solution.chosen, strict=True)
        for now in (group.choices[k],)
        for j, choice in enumerate(group.choices)
        if choice.cost < now.cost
    ]
    if not better:
        yield said + "every tensor has the best format that it may have"
        return
    extra, group, j = min(better, key=lambda b: b[0])
    tensor, name = problem.candidates[group.members[0]].tensor, group.points[j][0].format
    yield said + (
        f"the smallest step that would help, {tensor.name} to {name}, takes {format_bytes(extra)}"
    )


def _next_percent(
    best: Callable[[int], Solution], solution: Solution, capacity: int, budget: int
) -> NextPercent | None:
    """Return what one percent more would buy; None if the search finds nothing there."""
    if budget + budget // 100 > MOST_BYTES:
        return None
    try:
        larger = best(capacity + budget // 100)
    except BudgetError:
        return None
    changes = sum(a != b for a, b in zip(solution.chosen, larger.chosen, strict=True))
    return NextPercent(n_bytes=budget + budget // 100, total_cost=larger.cost, n_changes=changes)


def _too_small(problem: Problem, without: Problem, budget: int) -> BudgetError:
    """Return the error that says what would fit, with and without the floor, and what blocks it."""
    measurement, constraints = problem.measurement, problem.constraints
    safe = measurement.n_overhead_bytes + smallest(problem.items)
    bare = measurement.n_overhead_bytes + smallest(without.items)
    message = (
        f"budget {format_bytes(budget)} ({budget} bytes) is below the smallest plan, "
        f"{format_bytes(safe)} ({safe} bytes)"
    )
    if bare < safe:
        message += (
            f"; without the floor of {constraints.min_sqnr_db:g} dB it is "
            f"{format_bytes(bare)} ({bare} bytes)"
        )
    held = ", ".join(
        f"{c.tensor.name} {format_bytes(_least(c))}"
        for c in sorted(problem.candidates, key=_least, reverse=True)[:3]
    )
    kept = sum(
        padded(c.tensor.n_bytes, measurement.alignment)
        for c in problem.candidates
        if c.tensor.kept is not None
    )
    message += (
        f". The largest tensors at their smallest are {held}; "
        f"tensors that are never quantized take {format_bytes(kept)}, the header "
        f"{format_bytes(measurement.n_overhead_bytes)}. Raise --budget, lower --min-sqnr, "
        "drop pins or allow more formats with --formats"
    )
    return BudgetError(message, smallest=safe)


def _least(candidates: Candidates) -> int:
    return min(p.n_bytes for p in candidates.points)
