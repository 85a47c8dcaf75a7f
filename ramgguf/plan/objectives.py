"""What a plan minimises: each objective gives the cost of one tensor in one format.

Priors scale a cost; they never forbid a format. `weighted`, `nmse` and `ram` take unweighted
errors, also where an importance matrix weights the encoder's: with weighted errors their plans are
worse than without a matrix (docs/findings.md).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ramgguf.core.errors import PlanError
from ramgguf.gguf.identity import require_model, unsure
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.plan.prediction import predicted_kld
from ramgguf.plan.priors import ModelShape, prior
from ramgguf.plan.result import Assignment, PredictedKLD
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource
from ramgguf.sensitivity.result import Sensitivity

DEFAULT_OBJECTIVE = "weighted"
SENSITIVITY = "sensitivity"
POSTERIOR = "posterior"
MEASURED = (POSTERIOR, SENSITIVITY)  # objectives that need sensitivities; the first is the default

Objective = Callable[[TensorMeasurement, Point, ModelShape], float]


def weighted_nmse(tensor: TensorMeasurement, point: Point, shape: ModelShape) -> float:
    """n · π · NMSE: the soft prior of the tensor's role and depth, times its number of weights.

    The NMSE is that of the weights, and what rounding their inputs comes to.
    """
    return tensor.n_weights * prior(tensor, shape) * (point.unweighted + added_nmse(tensor, point))


def plain_nmse(tensor: TensorMeasurement, point: Point, shape: ModelShape) -> float:
    """n · NMSE, without priors."""
    return tensor.n_weights * point.unweighted


def ram(tensor: TensorMeasurement, point: Point, shape: ModelShape) -> float:
    """π · NRMSE as published: π is 10 for embedding and head, 3 first layer, 2 last layer, else 1.

    Source: "Budget-Aware Compression for LLMs via Rate-Distortion Optimization", baa.ai 2026.
    """
    if tensor.role in {"embedding", "tied_embedding", "head"}:
        published = 10.0
    elif shape.is_first(tensor):
        published = 3.0
    else:
        published = 2.0 if shape.is_last(tensor) else 1.0
    return published * math.sqrt(point.unweighted)


def activation_nmse(tensor: TensorMeasurement, point: Point, shape: ModelShape) -> float:
    """n · π · NMSE weighed by importance: the output's relative error, for uncorrelated inputs.

    What rounding the inputs comes to is added.
    """
    return tensor.n_weights * prior(tensor, shape) * (point.nmse + added_nmse(tensor, point))


def output_error(tensor: TensorMeasurement, point: Point, shape: ModelShape) -> float:
    """Squared error of the tensor's output per token, were its inputs uncorrelated.

    Needs an importance matrix. A tensor without an entry is looked up, a row for each token: its
    output's error is a row's.
    """
    squares = tensor.output_squares
    if squares is None:
        squares = tensor.sum_squares * tensor.row_length / tensor.n_weights
    return squares * point.nmse


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted_nmse,
    "nmse": plain_nmse,
    "ram": ram,
}

# Objectives that need errors weighted by an importance matrix.
WEIGHED: dict[str, Objective] = {"output": output_error, "activation": activation_nmse}

OBJECTIVE_NAMES = (*MEASURED, *OBJECTIVES, *WEIGHED)


Cost = Callable[[TensorMeasurement, Point], float]


@dataclass(frozen=True)
class Costing:
    """An objective made ready for one model.

    alpha, errors and late are known for sensitivities only: α by tensor, its relative standard
    error, and the share of it on tokens that scores count. sensitivity_sha256 tells which were
    used, notes what a plan made with them should say.
    """

    name: str
    cost: Cost
    alpha: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    late: Mapping[str, float] = field(default_factory=dict)
    sensitivity_sha256: str | None = None
    notes: tuple[str, ...] = ()

    def predicted_kld(
        self, assignments: Iterable[Assignment], encoder: EncoderName
    ) -> PredictedKLD | None:
        """Return the KLD that sensitivities predict; None where none were measured."""
        return predicted_kld(assignments, self.alpha, self.errors, self.late, encoder)


def costing(
    name: str | None, measurement: Measurement, sensitivity: Sensitivity | None = None
) -> Costing:
    """Return the objective of this name for the model; None takes the best that is known.

    That is POSTERIOR where there is a sensitivity, else DEFAULT_OBJECTIVE. Raises PlanError for
    names that are not known, and for a sensitivity that is missing, of another model or not used.
    """
    if name is None:
        name = DEFAULT_OBJECTIVE if sensitivity is None else POSTERIOR
    if name in MEASURED:
        return _by_sensitivity(name, measurement, sensitivity)
    try:
        objective = (OBJECTIVES | WEIGHED)[name]
    except KeyError:
        known = ", ".join(OBJECTIVE_NAMES)
        raise PlanError(f"objective {name!r} is unknown; known are {known}") from None
    if sensitivity is not None:
        raise PlanError(f"the objective {name} uses no sensitivity; leave one of the two out")
    if name in WEIGHED and measurement.imatrix is None:
        raise PlanError(f"the objective {name} needs errors that an importance matrix weighs")
    shape = ModelShape.of(measurement)
    return Costing(name, lambda tensor, point: objective(tensor, point, shape))


def _by_sensitivity(
    name: str, measurement: Measurement, sensitivity: Sensitivity | None
) -> Costing:
    """Return α times the NMSE, with that of rounded inputs: the KLD, in nats per token, that a
    tensor's quantization alone causes. For POSTERIOR, its geometric mean with the cost by priors.
    """
    if sensitivity is None:
        raise PlanError(f"the objective {name} needs a file; give it with --sensitivity")
    theirs = sensitivity.source
    require_model("the sensitivity", theirs, measurement.source)
    if _matrix(measurement.imatrix) != _matrix(sensitivity.imatrix):
        raise PlanError(
            f"the sensitivity was measured with {_told(sensitivity.imatrix)}, the curves with "
            f"{_told(measurement.imatrix)}; errors weighed differently do not go together"
        )
    alpha = {t.name: t.alpha for t in sensitivity.tensors}
    for tensor in measurement.tensors:
        if tensor.kept is None and tensor.name not in alpha:
            raise PlanError(f"{theirs.path}: {tensor.name} has no sensitivity; measure it again")

    def by_alpha(tensor: TensorMeasurement, point: Point) -> float:
        return alpha[tensor.name] * (point.nmse + added_nmse(tensor, point))

    return Costing(
        name,
        by_alpha if name == SENSITIVITY else _with_priors(by_alpha, measurement),
        alpha,
        {t.name: t.relative_error for t in sensitivity.tensors},
        sensitivity.late_shares(),
        sensitivity.sha256(),
        (*_other_encoder(measurement, sensitivity), *unsure("the sensitivity", theirs)),
    )


def _with_priors(cost: Cost, measurement: Measurement) -> Cost:
    """Return the geometric mean of a cost and the cost by priors, in the unit of the first.

    α is read from few tokens, one tensor at a time; priors are of other networks. Each errs in a
    way of its own, and plans by both are better than plans by either (docs/allocation.md).
    """
    shape = ModelShape.of(measurement)
    ratios = []
    for tensor in measurement.tensors:
        if tensor.kept is None:
            costs = [(cost(tensor, p), weighted_nmse(tensor, p, shape)) for p in tensor.points]
            logs = [math.log(a / b) for a, b in costs if a > 0 and b > 0]
            ratios += [math.fsum(logs) / len(logs)] if logs else []
    unit = math.exp(math.fsum(ratios) / len(ratios)) if ratios else 1.0
    return lambda tensor, point: math.sqrt(
        cost(tensor, point) * unit * weighted_nmse(tensor, point, shape)
    )


def _other_encoder(measurement: Measurement, sensitivity: Sensitivity) -> tuple[str, ...]:
    """Return a note where α was read with another encoder; a ratio, it is used all the same."""
    ours, theirs = measurement.encoder, sensitivity.encoder
    if ours == theirs:
        return ()
    return (f"sensitivities were measured with the encoder {theirs}, the errors with {ours}",)


def _matrix(imatrix: ImportanceSource | None) -> str | None:
    return None if imatrix is None else imatrix.identity


def _told(imatrix: ImportanceSource | None) -> str:
    return "no imatrix" if imatrix is None else f"the imatrix {imatrix.path}"
