"""What a plan minimises: each objective gives the cost of one tensor in one format.

The priors are soft: they scale a cost, they never forbid a format.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ramgguf.errors import PlanError
from ramgguf.schema import Point, TensorMeasurement

# Priors per weight and unit of NMSE; docs/allocation.md tells how they were fitted.
ROLE_PRIORS = {
    "attn_v": 4.0,
    "ffn_down": 2.0,
    "head": 2.0,
    "tied_embedding": 2.0,
}


@dataclass(frozen=True)
class Depth:
    """Where the model's first and last layers are, for priors that depend on them."""

    n_layers: int | None

    def is_first(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer == 0

    def is_last(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer is not None and tensor.layer == (self.n_layers or 0) - 1


Objective = Callable[[TensorMeasurement, Point, Depth], float]


def weighted_nmse(tensor: TensorMeasurement, point: Point, depth: Depth) -> float:
    """n · π · NMSE: the prior of the tensor's role, times its number of weights."""
    return tensor.n_weights * ROLE_PRIORS.get(tensor.role, 1.0) * point.nmse


def plain_nmse(tensor: TensorMeasurement, point: Point, depth: Depth) -> float:
    """n · NMSE, without priors."""
    return tensor.n_weights * point.nmse


def ram(tensor: TensorMeasurement, point: Point, depth: Depth) -> float:
    """π · NRMSE as published: π is 10 for embedding and head, 3 first layer, 2 last layer, else 1.

    Source: "Budget-Aware Compression for LLMs via Rate-Distortion Optimization", baa.ai 2026.
    """
    if tensor.role in {"embedding", "tied_embedding", "head"}:
        prior = 10.0
    elif depth.is_first(tensor):
        prior = 3.0
    else:
        prior = 2.0 if depth.is_last(tensor) else 1.0
    return prior * math.sqrt(point.nmse)


OBJECTIVES: dict[str, Objective] = {
    "weighted": weighted_nmse,
    "nmse": plain_nmse,
    "ram": ram,
}


def objective(name: str) -> Objective:
    """Return the objective of this name; raises PlanError that lists the known ones."""
    try:
        return OBJECTIVES[name]
    except KeyError:
        known = ", ".join(OBJECTIVES)
        raise PlanError(f"objective {name!r} is unknown; known are {known}") from None
