"""How much a weight's error is likely to matter, told from its role and depth alone.

The numbers are rounded medians of sensitivities measured on one network (SmolLM2-135M);
docs/allocation.md has the table they come from, and its limits. They are relative to a weight of
a query matrix in the middle of the model.
"""

from dataclasses import dataclass
from functools import lru_cache

from ramgguf.measure.result import Measurement, TensorMeasurement

ROLE_PRIORS = {
    "attn_v": 5.0,
    "attn_k": 0.75,
    "attn_qkv": 1.5,
    "attn_output": 1.3,
    "ffn_gate": 0.9,
    "ffn_up": 1.3,
    "ffn_down": 1.8,
    "embedding": 1.0,
    "tied_embedding": 1.3,
    "head": 1.3,
}
# Every weight of K and V serves all query heads of its group.
SHARED_BY_HEADS = frozenset({"attn_k", "attn_v"})
# Experts and shared experts are feed-forward matrices.
EXPERT_SUFFIXES = ("_exps", "_shexp", "_chexps")


@dataclass(frozen=True)
class DepthPrior:
    """What the role's prior is multiplied by in the first two and the last two layers."""

    first: float = 1.0
    second: float = 1.0
    second_last: float = 1.0
    last: float = 1.0


# Protecting one layer too much costs a few thousandths of the budget; too little can cost more
# than all other layers together. So the ends get nearly what was measured, and none gets less.
DEPTH_PRIORS = {
    "ffn_down": DepthPrior(5.0, 2.0, 2.5, 10.0),
    "ffn_up": DepthPrior(3.0, 1.5, 1.7, 5.0),
    "ffn_gate": DepthPrior(2.0, 1.5, 1.5, 3.0),
    "attn_output": DepthPrior(2.0, 2.0, 1.0, 1.0),
}
NO_DEPTH = DepthPrior()


@dataclass(frozen=True)
class ModelShape:
    """What priors need to know of the whole model; heads_per_kv is query heads per KV head."""

    n_layers: int | None
    heads_per_kv: float = 1.0

    @classmethod
    def of(cls, measurement: Measurement) -> "ModelShape":
        """Return the shape, with heads_per_kv from the sizes of the Q and K matrices."""
        n_q = sum(t.n_weights for t in measurement.tensors if t.role == "attn_q")
        n_k = sum(t.n_weights for t in measurement.tensors if t.role == "attn_k")
        return cls(measurement.n_layers, max(1.0, n_q / n_k) if n_k else 1.0)

    def is_first(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer == 0

    def is_last(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer is not None and tensor.layer == (self.n_layers or 0) - 1


def prior(tensor: TensorMeasurement, shape: ModelShape) -> float:
    """Return π, the soft prior of a weight of this tensor."""
    return _prior(tensor.role, tensor.layer, shape)


@lru_cache(maxsize=4096)
def _prior(role: str, layer: int | None, shape: ModelShape) -> float:
    for suffix in EXPERT_SUFFIXES:
        role = role.removesuffix(suffix)
    value = ROLE_PRIORS.get(role, 1.0)
    if role in SHARED_BY_HEADS:
        value *= shape.heads_per_kv
    return value * _depth(DEPTH_PRIORS.get(role, NO_DEPTH), layer, shape.n_layers)


def _depth(depth: DepthPrior, layer: int | None, n_layers: int | None) -> float:
    """Return the larger factor where a layer is counted from both ends, as in shallow models."""
    if layer is None:
        return 1.0
    from_start = {0: depth.first, 1: depth.second}.get(layer, 1.0)
    if n_layers is None:
        return from_start
    from_end = {0: depth.last, 1: depth.second_last}.get(n_layers - 1 - layer, 1.0)
    return max(from_start, from_end)
