"""A model and its vision projector planned together: one knapsack over the tensors of both.

Both costs are a number of weights times a prior times the NMSE, so that a byte goes where it lowers
their sum most. Where the model's costs are measured sensitivities, the projector's are brought to
the same scale: a weight of prior 1 costs what one of the model costs on average (geometric mean).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

from ramgguf.core.errors import PlanError
from ramgguf.gguf.architecture import PROJECTORS
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.plan.objectives import MEASURED, OBJECTIVES, WEIGHED, Cost, Costing, weighted_nmse
from ramgguf.plan.priors import ModelShape, prior
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints


def projector_cost(costing: Costing, model: Measurement, projector: Measurement) -> Cost:
    """Return what a projector's tensors cost in the unit of the model's.

    Raises PlanError for an objective that no projector has: errors of outputs on texts.
    """
    shape = ModelShape.of(projector)
    if costing.name in MEASURED:
        scale = _per_prior(costing.cost, model)
        return lambda tensor, point: scale * weighted_nmse(tensor, point, shape)
    if costing.name in OBJECTIVES:
        objective = OBJECTIVES[costing.name]
        return lambda tensor, point: objective(tensor, point, shape)
    if costing.name == "activation":  # as weighted, but for the matrix, which projectors lack
        return lambda tensor, point: weighted_nmse(tensor, point, shape)
    assert costing.name in WEIGHED
    raise PlanError(
        f"the objective {costing.name} is in units of a text's activations, which a projector has "
        "none of: plan the two apart, or by another objective"
    )


def _per_prior(cost: Cost, model: Measurement) -> float:
    """Return the cost, in the objective's unit, of a weight of prior 1 at an NMSE of 1."""
    shape = ModelShape.of(model)
    logs = [math.log(found) for t in model.tensors if (found := _rate(cost, t, shape)) > 0]
    if not logs:
        raise PlanError("no tensor of the model is sensitive: nothing to compare a projector with")
    return math.exp(math.fsum(logs) / len(logs))


def _rate(cost: Cost, tensor: TensorMeasurement, shape: ModelShape) -> float:
    point: Point | None = next((p for p in tensor.points if p.nmse > 0), None)
    if tensor.kept is not None or point is None:
        return 0.0
    loss = point.nmse + added_nmse(tensor, point)
    return cost(tensor, point) / (loss * tensor.n_weights * prior(tensor, shape))


def constraints_of_each(
    constraints: Constraints, model: Measurement, projector: Measurement
) -> tuple[Constraints, Constraints]:
    """Return the constraints of the model, and those of the projector.

    A pin, or a minimum of a role, that suits nothing of the model is the projector's if it suits
    something there. Ties are the model's; formats and the floor hold for both.
    """

    def pinned(measurement: Measurement, pattern: str) -> bool:
        return any(re.search(pattern, t.name) for t in measurement.tensors)

    def has_role(measurement: Measurement, role: str) -> bool:
        return any(t.role == role and t.kept is None for t in measurement.tensors)

    pins = tuple(
        p for p in constraints.pins
        if not pinned(model, p.pattern) and pinned(projector, p.pattern)
    )  # fmt: skip
    least = tuple(
        m for m in constraints.min_formats
        if not has_role(model, m.role) and has_role(projector, m.role)
    )  # fmt: skip
    formats = constraints.formats
    if formats is not None:
        formats = tuple(name for name in formats if name in projector.formats)
    return (
        constraints.model_copy(
            update={
                "pins": tuple(p for p in constraints.pins if p not in pins),
                "min_formats": tuple(m for m in constraints.min_formats if m not in least),
            }
        ),
        Constraints(
            min_sqnr_db=constraints.min_sqnr_db, formats=formats, pins=pins, min_formats=least
        ),
    )


def require_projector(projector: Measurement) -> None:
    """Raise PlanError unless a projector was measured."""
    if projector.source.architecture not in PROJECTORS:
        raise PlanError(
            f"{projector.source.path}: is a {projector.source.architecture} model, expected a "
            "vision projector (clip)"
        )


def joined(model: Problem, projector: Problem) -> Problem:
    """Return the problem of both: the model's tensors first, then the projector's."""
    n = len(model.candidates)
    both = model.measurement.model_copy(
        update={
            "tensors": (*model.measurement.tensors, *projector.measurement.tensors),
            "n_overhead_bytes": model.measurement.n_overhead_bytes
            + projector.measurement.n_overhead_bytes,
        }
    )
    moved = (
        replace(group, members=tuple(i + n for i in group.members)) for group in projector.groups
    )
    return Problem(
        both, model.constraints, (*model.candidates, *projector.candidates),
        (*model.groups, *moved), model.cost,
    )  # fmt: skip


def together_notes() -> Iterator[str]:
    """Yield what a plan of both should say."""
    yield (
        "planned together with the projector, by priors that are a guess for it: no image was "
        "looked at; --min-format projector=Q8_0, or a --pin that matches its tensors, gives it more"
    )
