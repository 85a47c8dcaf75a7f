"""Priors: how much a weight's error is likely to matter, from its role and depth alone.

The numbers are rounded geometric means of the medians of sensitivities measured on two networks
(SmolLM2-135M, Qwen2.5-Coder-0.5B); docs/allocation.md has the table they come from, how priors of
one do on the other, and their limits. They are relative to a weight of ffn_gate. What was not
measured follows from what was: a fused tensor from its parts, a low-rank factor from the matrix
that it stands for.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from ramgguf.gguf.architecture import (
    PARTS,
    PROJECTORS,
    draft_layers,
    has_tied_embedding,
    parse_name,
    part_of,
    trunk_layers,
)
from ramgguf.measure.result import Measurement, TensorMeasurement

# By the name of the part (gguf/architecture.py), without what says that it is an expert's.
PART_PRIORS = {
    "attn_q": 0.65,
    "attn_k": 1.05,
    "attn_v": 5.2,
    "attn_output": 2.6,
    "attn_o": 2.6,
    "attn_out": 2.6,
    "ffn_gate": 1.0,
    "ffn_up": 1.4,
    "ffn_down": 1.4,
    "token_embd": 0.35,
    "output": 1.2,
    "nextn.shared_head_head": 1.2,
}
TIED_EMBEDDING = 1.2
# Every weight of K and V serves all query heads of its group.
SHARED_BY_HEADS = frozenset({"attn_k", "attn_v"})
# Factors of multi-head latent attention, and the matrices that each stands for.
LOW_RANK = {
    "attn_q_a": ("attn_q",),
    "attn_q_b": ("attn_q",),
    "attn_k_b": ("attn_k",),
    "attn_v_b": ("attn_v",),
    "attn_kv_b": ("attn_k", "attn_v"),
    "attn_kv_a_mqa": ("attn_k", "attn_v"),
}
# Experts and shared experts are feed-forward matrices.
EXPERT_SUFFIXES = ("_exps", "_shexp", "_chexps")


@dataclass(frozen=True)
class DepthPrior:
    """What the part's prior is multiplied by in the first two and the last two layers.

    thirds are the factors of the layers between: in the first third of them, the second, the last.
    """

    first: float = 1.0
    second: float = 1.0
    second_last: float = 1.0
    last: float = 1.0
    thirds: tuple[float, float, float] = (1.4, 0.8, 0.7)


# Protecting one layer too much costs a few thousandths of the budget; too little can cost more
# than all other layers together. So queries and keys at the ends do not get the little that was
# measured, and their second layer, where a text's first tokens alone are sensitive, gets less.
_OUTPUT = DepthPrior(2.7, 5.7, 0.5, 0.7)
_QUERY = DepthPrior(1.0, 2.5, 1.0, 1.0)
DEPTH_PRIORS = {
    "attn_q": _QUERY,
    "attn_k": _QUERY,
    "attn_v": DepthPrior(2.0, 4.7, 0.5, 0.5, thirds=(2.0, 0.8, 0.6)),
    "attn_output": _OUTPUT,
    "attn_o": _OUTPUT,
    "attn_out": _OUTPUT,
    "ffn_gate": DepthPrior(4.8, 2.2, 1.0, 2.2),
    "ffn_up": DepthPrior(4.3, 1.9, 1.2, 3.8),
    "ffn_down": DepthPrior(7.5, 2.5, 1.4, 4.4),
}
NO_DEPTH = DepthPrior(thirds=(1.0, 1.0, 1.0))
# Of encoders of images and sound nothing was measured: no part of their first and last layer gets
# less than this, nor does the projector, which all that they say passes through.
PROJECTOR_ENDS = DepthPrior(3.0, 1.0, 1.0, 3.0, thirds=(1.0, 1.0, 1.0))
PROJECTOR = 3.0


@dataclass(frozen=True)
class ModelShape:
    """What priors need to know of the whole model.

    n_layers counts those of the trunk; layers from there on, and drafts, predict further tokens.
    heads_per_kv is query heads per KV head. full_ratio says of low-rank factors how many weights
    of the full matrix one of theirs stands for.
    """

    n_layers: int | None
    heads_per_kv: float = 1.0
    architecture: str = ""
    tied: bool = False
    drafts: frozenset[int] = frozenset()
    full_ratio: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, measurement: Measurement) -> "ModelShape":
        """Return the shape that the tensors' names and sizes give."""
        names = [t.name for t in measurement.tensors]
        arch = measurement.source.architecture
        first: dict[str, TensorMeasurement] = {}
        n_weights: dict[str, int] = {}
        for tensor in measurement.tensors:
            part = part_of(tensor.name, arch)
            first.setdefault(part, tensor)
            n_weights[part] = n_weights.get(part, 0) + tensor.n_weights
        return cls(
            n_layers=trunk_layers(names, measurement.n_layers),
            heads_per_kv=_heads_per_kv(first, n_weights),
            architecture=arch,
            tied=has_tied_embedding(names),
            drafts=draft_layers(names),
            full_ratio=tuple(_full_ratios(first).items()),
        )

    def is_draft(self, layer: int) -> bool:
        """Return whether the layer predicts further tokens."""
        return layer in self.drafts or (self.n_layers is not None and layer >= self.n_layers)

    def is_first(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer == 0

    def is_last(self, tensor: TensorMeasurement) -> bool:
        return tensor.layer is not None and tensor.layer == (self.n_layers or 0) - 1


def _heads_per_kv(first: dict[str, TensorMeasurement], n_weights: dict[str, int]) -> float:
    n_q, n_k = n_weights.get("attn_q", 0), n_weights.get("attn_k", 0)
    fused, output = first.get("attn_qkv"), first.get("attn_output")
    if not n_k and fused is not None and output is not None:
        # Its rows are those of Q, which are the columns of the output, then K and V.
        n_q = output.row_length
        n_k = (fused.n_weights // fused.row_length - n_q) // 2
    return max(1.0, n_q / n_k) if n_q > 0 and n_k > 0 else 1.0


def _full_ratios(first: dict[str, TensorMeasurement]) -> dict[str, float]:
    """Return weights of the full matrix per weight of each low-rank factor that the model has.

    A relative error of a factor is one of the same size of its product with the other factor. So
    all of a factor's weights together matter as much as the full matrix of that product would.
    """
    ratios: dict[str, float] = {}
    q_a, q_b = first.get("attn_q_a"), first.get("attn_q_b")
    if q_a is not None and q_b is not None:
        width, rank, rows = q_a.row_length, q_b.row_length, q_b.n_weights // q_b.row_length
        ratios |= {"attn_q_a": rows / rank, "attn_q_b": width / rank}
    kv_a = first.get("attn_kv_a_mqa")
    if kv_a is None:
        return ratios
    width, columns = kv_a.row_length, kv_a.n_weights // kv_a.row_length
    both, k_b, v_b = (first.get(part) for part in ("attn_kv_b", "attn_k_b", "attn_v_b"))
    rank, rows = columns, 0
    if both is not None:
        rank, rows = both.row_length, both.n_weights // both.row_length
    elif k_b is not None and v_b is not None:
        rank = v_b.row_length
        rows = (k_b.n_weights + v_b.n_weights) // rank
    ratios |= dict.fromkeys(("attn_kv_b", "attn_k_b", "attn_v_b"), width / rank)
    ratios["attn_kv_a_mqa"] = rows / columns if rows else width / rank
    return ratios


def prior(tensor: TensorMeasurement, shape: ModelShape) -> float:
    """Return π, the soft prior of a weight of this tensor."""
    return _prior(tensor.name, shape)


@lru_cache(maxsize=65536)
def _prior(name: str, shape: ModelShape) -> float:
    parsed, part = parse_name(name), part_of(name, shape.architecture)
    if parsed.layer is None:
        if shape.tied and part == "token_embd":
            return TIED_EMBEDDING
        if shape.architecture in PROJECTORS:
            return PROJECTOR
        return PART_PRIORS.get(part, 1.0)
    for suffix in EXPERT_SUFFIXES:
        part = part.removesuffix(suffix)
    layer: int | None = parsed.layer
    if shape.is_draft(parsed.layer):
        layer = None  # its errors make drafts worse, never the text: no end of the trunk
    return _of_part(part, layer, shape)


def _of_part(part: str, layer: int | None, shape: ModelShape) -> float:
    if part in LOW_RANK:
        full = [PART_PRIORS[p] * _depth_of(p, layer, shape) for p in LOW_RANK[part]]
        return math.fsum(full) / len(full) * max(1.0, dict(shape.full_ratio).get(part, 1.0))
    if part in PART_PRIORS:
        depth = _depth_of(part, layer, shape)
        if shape.architecture in PROJECTORS:
            depth = max(depth, _depth(PROJECTOR_ENDS, layer, shape.n_layers))
        return PART_PRIORS[part] * _sharing(part, shape) * depth
    fused = PARTS[part].fuses if part in PARTS else ()
    if not fused:
        return 1.0
    # The mean by weights: a fused tensor costs what its parts apart would cost in its format.
    sizes = [1.0 / _sharing(p, shape) for p in fused]
    values = [_of_part(p, layer, shape) for p in fused]
    return math.fsum(map(math.prod, zip(sizes, values, strict=True))) / math.fsum(sizes)


def _sharing(part: str, shape: ModelShape) -> float:
    return shape.heads_per_kv if part in SHARED_BY_HEADS else 1.0


def _depth_of(part: str, layer: int | None, shape: ModelShape) -> float:
    return _depth(DEPTH_PRIORS.get(part, NO_DEPTH), layer, shape.n_layers)


def _depth(depth: DepthPrior, layer: int | None, n_layers: int | None) -> float:
    """Return the larger factor where a layer is counted from both ends, as in shallow models.

    No layer is a draft block: of the layers between the ends, the one that matters most, as one
    block too many protected costs little.
    """
    if layer is None:
        return max(depth.thirds)
    from_start = {0: depth.first, 1: depth.second}.get(layer)
    if n_layers is None:
        return 1.0 if from_start is None else from_start
    from_end = {0: depth.last, 1: depth.second_last}.get(n_layers - 1 - layer)
    ends = [factor for factor in (from_start, from_end) if factor is not None]
    if ends:
        return max(ends)
    return depth.thirds[3 * (layer - 2) // (n_layers - 4)]
