"""Why a plan gives each tensor what it gives: its next steps up and down, and their prices.

The price of a plan is the Lagrange multiplier of its bytes: what one byte more would lower the
objective by. A format is chosen where its last step up buys more than that per byte, and its next
one less.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.core.errors import PlanError
from ramgguf.gguf.identity import require_model
from ramgguf.measure.result import Measurement
from ramgguf.plan.knapsack import Choice, price
from ramgguf.plan.objectives import costing
from ramgguf.plan.problem import Barred, Group, Problem
from ramgguf.plan.result import Assignment, Plan
from ramgguf.sensitivity.result import Sensitivity


@dataclass(frozen=True)
class Step:
    """A change of one tensor's (or tied tensors') format: bytes and objective, signed.

    rate is what each byte buys (up) or saves at the expense of (down): −cost/bytes.
    """

    format: str
    n_bytes: int
    cost: float

    @property
    def rate(self) -> float:
        return -self.cost / self.n_bytes


@dataclass(frozen=True)
class Explanation:
    """Why a tensor has its format; up is the best-paying larger step, down the cheapest smaller.

    tied names the tensors that take the same format; steps are of all of them together.
    """

    assignment: Assignment
    tied: tuple[str, ...]
    up: Step | None
    down: Step | None
    barred: tuple[Barred, ...]


@dataclass(frozen=True)
class PlanExplanation:
    """A plan's price, in units of the objective per byte, and every tensor's explanation."""

    plan: Plan
    price: float
    tensors: tuple[Explanation, ...]

    def of(self, name: str) -> Explanation:
        """Return the explanation of the tensor of this name; raises PlanError if there is none."""
        for e in self.tensors:
            if e.assignment.name == name:
                return e
        raise PlanError(f"the plan has no tensor {name!r}")

    def reason(self, e: Explanation) -> str:
        """Return the sentence that says why the tensor has its format."""
        if e.assignment.note is not None:
            return f"no choice: {e.assignment.note}"
        said = []
        if e.down is not None and self.price > 0:
            said.append(f"{e.down.format} would lose {e.down.rate / self.price:.2g} × the price")
        elif e.down is None:
            smaller = [b for b in e.barred if b.floor]
            why = f" ({smaller[-1].format}: {smaller[-1].reason})" if smaller else ""
            said.append(f"the smallest allowed{why}")
        if e.up is not None and self.price > 0:
            said.append(f"{e.up.format} would bring {e.up.rate / self.price:.2g} × the price")
        elif e.up is None:
            said.append("nothing larger would help")
        if self.plan.speed is not None:
            said.append("these are prices of bytes, and the plan is bound by speed, too")
        if self.plan.division is not None:
            said.append("these are prices of bytes in all, and the plan fits two memories")
        return "; ".join(said) or "the budget allows everything its best"


def explain(
    plan: Plan, measurement: Measurement, sensitivity: Sensitivity | None = None
) -> PlanExplanation:
    """Return why every tensor of the plan has its format.

    Raises PlanError when the plan was not made from this measurement and sensitivity.
    """
    _check(plan, measurement)
    used = costing(plan.objective, measurement, sensitivity)
    if used.sensitivity_sha256 != plan.sensitivity_sha256:
        raise PlanError("the plan was made with another sensitivity file; plan again")
    problem = Problem.of(measurement, plan.constraints, used.cost)
    explained: dict[int, Explanation] = {}
    for group in problem.groups:
        names = tuple(plan.assignments[i].name for i in group.members)
        down, up = _steps(group, plan.assignments[group.members[0]])
        for i in group.members:
            tied = tuple(n for n in names if n != plan.assignments[i].name)
            barred = problem.candidates[i].barred
            explained[i] = Explanation(plan.assignments[i], tied, up, down, barred)
    return PlanExplanation(
        plan,
        price(problem.items, plan.n_bytes - plan.n_overhead_bytes),
        tuple(explained[i] for i in range(len(plan.assignments))),
    )


def _check(plan: Plan, measurement: Measurement) -> None:
    require_model("the plan", plan.source, measurement.source)
    names = [t.name for t in measurement.tensors]
    if names != [a.name for a in plan.assignments] or plan.encoder != measurement.encoder:
        raise PlanError(
            f"the plan ({plan.encoder} encoder) was not made from this measurement "
            f"({measurement.encoder} encoder); plan again"
        )
    planned, measured = (
        None if one.imatrix is None else one.imatrix.encoding for one in (plan, measurement)
    )
    if planned != measured:
        raise PlanError(
            "the plan was not made from this measurement: importance matrix, Hessians or scales "
            "are others; give the measurement that was made with the same"
        )


def _steps(group: Group, now: Assignment) -> tuple[Step | None, Step | None]:
    """Return the least harmful step down and the best-paying step up from the present format."""
    j = next((j for j, row in enumerate(group.points) if row[0].format == now.format), None)
    if j is None:
        raise PlanError(f"{now.name}: {now.format} is not among what the constraints allow")
    steps = _changes(group, group.choices[j])
    down = min((s for s in steps if s.n_bytes < 0), key=lambda s: s.rate, default=None)
    up = max((s for s in steps if s.n_bytes > 0 > s.cost), key=lambda s: s.rate, default=None)
    return down, up


def _changes(group: Group, now: Choice) -> Sequence[Step]:
    return [
        Step(row[0].format, choice.n_bytes - now.n_bytes, choice.cost - now.cost)
        for row, choice in zip(group.points, group.choices, strict=True)
    ]
