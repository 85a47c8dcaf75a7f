"""What a plan minimises: each objective gives the cost of one tensor in one format.

The priors are soft: they scale a cost, they never forbid a format.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ramgguf.errors import PlanError
from ramgguf.schema import Measurement, Point, TensorMeasurement

# Priors per weight and unit of NMSE, relative to an average matrix: rounded medians of measured
# sensitivities of one network (SmolLM2-135M); docs/allocation.md has the table and its limits.
ROLE_PRIORS = {
    "attn_v": 5.0,
    "attn_k": 0.75,
    "attn_qkv": 1.5,
    "attn_output": 1.4,
    "ffn_up": 1.3,
    "ffn_down": 2.0,
    "embedding": 1.0,
    "tied_embedding": 1.3,
    "head": 1.3,
}
# Every weight of K and V serves all query heads of its group.
SHARED_BY_HEADS = frozenset({"attn_k", "attn_v"})
FIRST_LAYER_PRIOR = 2.5
LAST_LAYER_PRIOR = 1.5


@dataclass(frozen=True)
class Shape:
    """What priors need to know of the whole model; heads_per_kv is query heads per KV head."""

    n_layers: int | None
    heads_per_kv: float = 1.0

    @classmethod
    def of(cls, measurement: Measurement) -> "Shape":
        """Return the shape, with heads_per_kv from the sizes of the Q and K matrices."""
        n_q = sum(t.n_weights for t in measurement.tensors if t.role == "attn_q")
        n_k = sum(t.n_weights for t in measurement.tensors if t.role == "attn_k")
        return cls(measurement.n_layers, max(1.0, n_q / n_k) if n_k else 1.0)

    def is_first(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer == 0

    def is_last(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer is not None and tensor.layer == (self.n_layers or 0) - 1


Objective = Callable[[TensorMeasurement, Point, Shape], float]


def prior(tensor: TensorMeasurement, shape: Shape) -> float:
    """Return π, the soft prior of a weight of this tensor."""
    value = ROLE_PRIORS.get(tensor.role, 1.0)
    if tensor.role in SHARED_BY_HEADS:
        value *= shape.heads_per_kv
    if shape.is_first(tensor):
        return value * FIRST_LAYER_PRIOR
    return value * LAST_LAYER_PRIOR if shape.is_last(tensor) else value


def weighted_nmse(tensor: TensorMeasurement, point: Point, shape: Shape) -> float:
    """n · π · NMSE: the soft prior of the tensor's role and depth, times its number of weights."""
    return tensor.n_weights * prior(tensor, shape) * point.nmse


def plain_nmse(tensor: TensorMeasurement, point: Point, shape: Shape) -> float:
    """n · NMSE, without priors."""
    return tensor.n_weights * point.nmse


def ram(tensor: TensorMeasurement, point: Point, shape: Shape) -> float:
    """π · NRMSE as published: π is 10 for embedding and head, 3 first layer, 2 last layer, else 1.

    Source: "Budget-Aware Compression for LLMs via Rate-Distortion Optimization", baa.ai 2026.
    """
    if tensor.role in {"embedding", "tied_embedding", "head"}:
        published = 10.0
    elif shape.is_first(tensor):
        published = 3.0
    else:
        published = 2.0 if shape.is_last(tensor) else 1.0
    return published * math.sqrt(point.nmse)


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted_nmse,
    "nmse": plain_nmse,
    "ram": ram,
}


Cost = Callable[[TensorMeasurement, Point], float]


def cost_function(name: str, measurement: Measurement) -> Cost:
    """Return the cost of a tensor in a format under the objective of this name.

    Raises PlanError that lists the known names.
    """
    try:
        objective = OBJECTIVES[name]
    except KeyError:
        known = ", ".join(OBJECTIVES)
        raise PlanError(f"objective {name!r} is unknown; known are {known}") from None
    shape = Shape.of(measurement)
    return lambda tensor, point: objective(tensor, point, shape)
