"""The table of tensors: what each one is for, what it reads, and what it stands for.

Names are those of llama.cpp: `blk.<layer>.<part>.weight` within layers, `<part>.weight` outside.
Encoders of images and sound (mmproj files) put `v.` or `a.` in front (tools/mtmd/clip-impl.h).
Whatever depends on what a tensor is asks here: priors, importance matrices, calibration, ties,
memory. What reads what is as in the graphs of llama.cpp (src/models, late 2026).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TOKEN_EMBEDDING, HEAD = "token_embd.weight", "output.weight"

# No model has a million layers; a longer number is part of an unknown name.
_LAYER = re.compile(
    r"^(?P<stack>(?:enc|dec|v|v\.sam|a)\.)?blk\.(?P<layer>[0-9]{1,6})\.(?P<rest>.+)$"
)


@dataclass(frozen=True)
class Part:
    """What tensors of one name are.

    role says what they are for. Parts of one layer with the same `reads` are multiplied with the
    same activations. `fuses` names the parts that this one holds, or stands for, in one matrix.
    Looked-up tensors give rows to tokens and are multiplied with nothing; where `llama.cpp` keeps
    a tensor beside the CPU whatever is offloaded, it is an `input`.
    """

    role: str
    reads: str | None = None
    fuses: tuple[str, ...] = ()
    looked_up: bool = False
    is_input: bool = False


def _feed_forward(kind: str, suffix: str, *, fused: bool = True) -> dict[str, Part]:
    gate, up, down = (f"ffn_{part}{suffix}" for part in ("gate", "up", "down"))
    parts = {gate: Part(gate, kind), up: Part(up, kind), down: Part(down)}
    if fused:
        both = f"ffn_gate_up{suffix}"
        parts[both] = Part(both, kind, fuses=(gate, up))
    return parts


PARTS: Mapping[str, Part] = {
    "token_embd": Part("embedding", looked_up=True, is_input=True),
    "token_embd_norm": Part("norm", is_input=True),
    "token_types": Part("other", looked_up=True, is_input=True),
    "position_embd": Part("other", looked_up=True, is_input=True),
    "per_layer_token_embd": Part("embedding", looked_up=True, is_input=True),
    "output": Part("head", "head"),
    # Attention. Its norm's output feeds the projections, the gate and the first factors of MLA.
    "attn_q": Part("attn_q", "attention"),
    "attn_k": Part("attn_k", "attention"),
    "attn_v": Part("attn_v", "attention"),
    "attn_qkv": Part("attn_qkv", "attention", fuses=("attn_q", "attn_k", "attn_v")),
    "attn_gate": Part("attn_gate", "attention"),
    "attn_output": Part("attn_output"),
    "attn_o": Part("attn_output"),
    "attn_out": Part("attn_output"),
    # Multi-head latent attention: Q = q_b · q_a; K and V = k_b and v_b (or kv_b) · kv_a_mqa.
    "attn_q_a": Part("attn_q", "attention"),
    "attn_q_b": Part("attn_q"),
    "attn_kv_a_mqa": Part("attn_kv", "attention", fuses=("attn_k", "attn_v")),
    "attn_kv_b": Part("attn_kv", fuses=("attn_k_b", "attn_v_b")),
    "attn_k_b": Part("attn_k"),
    "attn_v_b": Part("attn_v"),
    # A decoder's attention to the encoder: K and V read what that made, Q does not.
    "cross_attn_q": Part("cross_attn_q"),
    "cross_attn_k": Part("cross_attn_k", "encoder"),
    "cross_attn_v": Part("cross_attn_v", "encoder"),
    "cross_attn_o": Part("cross_attn_output"),
    **_feed_forward("feed forward", ""),
    **_feed_forward("experts", "_exps"),
    **_feed_forward("shared experts", "_shexp", fused=False),
    **_feed_forward("chunk experts", "_chexps", fused=False),
    "ffn_gate_inp": Part("router"),
    "ffn_gate_inp_shexp": Part("router"),
    "ffn_gate_tid2eid": Part("router"),
    "altup_router": Part("router"),
    "nextn.embed_tokens": Part("embedding", looked_up=True),
    "nextn.shared_head_head": Part("head"),
}
# Parts whose role is their own name.
_OWN_ROLE = re.compile(
    r"cross_attn_output"
    r"|ssm_\w+|shortconv\.\w+|time_mix_\w+|channel_mix_\w+|indexer\.\w+|nextn\.\w+"
)
_OTHER = Part("other")

# Of multi-head latent attention: kv_b reads the latent vectors, and v_b what attention makes of
# them, means over tokens, head by head. k_b, which kv_b stands for as well, reads queries.
_SAME_COLUMNS = {"attn_kv_b": "attn_v_b", "attn_v_b": "attn_kv_b"}

# Whose ffn_up holds the gate as well (twice the feed-forward length of rows).
_GATED_UP = frozenset({"phi3", "chatglm", "glm4", "plamo2", "plamo3", "modern-bert"})

_NORM = re.compile(r"(?:^|[._])(?:norm\w*|ln\d?|enorm|hnorm)$|_norm(?:_\w+)?$")

# Parts of a draft (multi-token prediction) block only; all of its layer belongs to it.
_DRAFT = "nextn."

# Ends of the parts whose third dimension counts experts.
_EXPERTS = ("_exps", "_chexps")
# What llama.cpp's --n-cpu-moe keeps in RAM (LLM_FFN_EXPS_REGEX in common/common.h).
_KEPT_BY_CPU_MOE = re.compile(r"^blk\.[0-9]+\.ffn_(up|down|gate|gate_up)_(ch|)exps")

# What llama.cpp's quantizer leaves alone by name (tensor_allows_quantization in
# src/llama-quant.cpp), and why it is left alone.
_KEPT_PARTS: Mapping[str, str] = {
    "_norm.weight": "a norm",
    "ffn_gate_inp.weight": "a router",
    "ffn_gate_tid2eid.weight": "a routing table",
    "altup": "altup, very small",
    "laurel": "laurel, very small",
    "per_layer_model_proj": "per_layer_model_proj, small",
    "ssm_conv1d": "a short convolution",
    "shortconv.conv.weight": "a short convolution",
    "indexer.k_proj.weight": "an indexer's projection, very small",
    "indexer.q_proj.weight": "an indexer's projection, very small",
    **{
        f"time_mix_{part}.weight": "a small RWKV time-mix tensor"
        for part in (
            "first",
            *("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2"),
            *("decay_w1", "decay_w2", "lerp_fused"),
        )
    },
    "attn_rel_b.weight": "a relative position bias",
    ".position_embd": "a position embedding",
    "sam.pos_embd": "a position embedding",
    "sam.neck.": "an image encoder's neck",
    "sam.net_": "an image encoder's neck",
    ".rel_pos": "a relative position embedding",
    ".patch_embd": "a patch embedding",
    ".patch_merger": "a patch merger",
    "a.rvq.codebook": "an audio codebook",
    "mm.a.code_embd": "an audio codebook",
}
_KEPT_NAMES: Mapping[str, str] = {
    "position_embd.weight": "a position embedding",
    "token_types.weight": "token-type embeddings",
}
# All that never_quantized says, but for what llama.cpp's quantizer would change in an mmproj file.
NEVER_QUANTIZED = frozenset(
    (
        *("one-dimensional", "four-dimensional", "not a weight"),
        *_KEPT_PARTS.values(),
        *_KEPT_NAMES.values(),
    )
)

# general.architecture of mmproj files: an encoder of images or sound, and the projector to the
# language model. What llama.cpp (tools/mtmd/models) does with these weights but multiply them by
# activations: convolve, look rows up, add, or turn them first, for which blocks have no kernels.
PROJECTORS = frozenset({"clip", "mmproj"})
_KEPT_IN_PROJECTORS: Mapping[str, str] = {
    "conv": "a convolution",
    "embd": "an embedding",
    "codebook": "a codebook",
    "pos_": "a position embedding",
    "input_projection": "turned by llama.cpp before it multiplies",
}
# Convolutions of one step, which are products.
_POINTWISE = ("conv_pw1.weight", "conv_pw2.weight")
# Where what the encoder made is put together for the language model.
_PROJECTION = re.compile(r"mm\.|resampler\.|adapter\.|v\.(deepstack|vit_merger)\.")


@dataclass(frozen=True)
class TensorName:
    """The parts of a tensor's name: stack is 'enc.', 'dec.', 'v.', 'v.sam.', 'a.' or empty, kind
    'weight' or 'bias'.
    """

    stack: str
    layer: int | None
    part: str
    kind: str

    @property
    def block(self) -> str:
        """What comes before the part."""
        return "" if self.layer is None else f"{self.stack}blk.{self.layer}."


def parse_name(name: str) -> TensorName:
    """Return the name's pieces; any text has some."""
    match = _LAYER.match(name)
    part, _, kind = (match["rest"] if match else name).rpartition(".")
    stack = (match["stack"] or "") if match else ""
    return TensorName(stack, int(match["layer"]) if match else None, part, kind)


def layer_of(name: str) -> int | None:
    """Return the number of the layer that the tensor belongs to; None outside of layers."""
    return parse_name(name).layer


def first_layer(name: str, n_layers: int, *, tied: bool) -> int:
    """Return the first of n_layers whose output, or what follows it, depends on the tensor.

    The layers before compute the same whatever the tensor is.
    """
    found = parse_name(name)
    if found.layer is not None and name.startswith("blk."):
        return min(found.layer, n_layers - 1)
    return n_layers - 1 if name == HEAD and not tied else 0


def part_of(name: str, arch: str = "") -> str:
    """Return the name that the tensor has in PARTS, or would have: 'attn_q', 'ffn_gate_up', …

    That of a bias or scale is its whole name within the layer.
    """
    parsed = parse_name(name)
    if parsed.kind != "weight":
        return f"{parsed.part}.{parsed.kind}".lstrip(".")
    if parsed.part == "ffn_up" and arch in _GATED_UP:
        return "ffn_gate_up"
    return parsed.part


def role_of(name: str, arch: str = "", *, tied: bool = False) -> str:
    """Return what the tensor is for: 'embedding', 'head', 'attn_q', 'ffn_down_exps', 'norm', ...

    Tensors that fit no role are 'other', biases 'bias', the projection of an mmproj file
    'projector'. tied says that the embedding is the head as well (see has_tied_embedding); its role
    is then 'tied_embedding'.
    """
    parsed = parse_name(name)
    part = part_of(name, arch)
    if _NORM.search(parsed.part if parsed.kind in ("weight", "bias", "scale") else part):
        return "norm"
    if parsed.kind == "bias":
        return "bias"
    if tied and name == TOKEN_EMBEDDING:
        return "tied_embedding"
    if arch in PROJECTORS and _PROJECTION.match(name):
        return "projector"
    known = PARTS.get(part)
    if known is not None:
        return known.role
    return part if _OWN_ROLE.fullmatch(part) else "other"


def has_tied_embedding(names: Iterable[str]) -> bool:
    """Return whether the token embedding of the model with these tensors is its head, too.

    Embeddings per layer (gemma3n) and those of draft blocks are neither.
    """
    found = set(names)
    return TOKEN_EMBEDDING in found and HEAD not in found


def is_looked_up(name: str, *, tied: bool) -> bool:
    """Return whether tokens look up rows of the tensor, and nothing is multiplied with it."""
    if tied and name == TOKEN_EMBEDDING:
        return False
    return PARTS.get(part_of(name), _OTHER).looked_up


def is_multiplied(name: str, shape: tuple[int, ...], arch: str, *, tied: bool) -> bool:
    """Return whether it is a matrix for activations that may be quantized."""
    return never_quantized(name, shape, arch) is None and not is_looked_up(name, tied=tied)


def is_of_experts(name: str) -> bool:
    """Return whether the tensor holds experts, of which a token uses some."""
    return parse_name(name).part.endswith(_EXPERTS)


def is_kept_by_cpu_moe(name: str) -> bool:
    """Return whether llama.cpp's --n-cpu-moe keeps the tensor in RAM, in the layers it names."""
    return _KEPT_BY_CPU_MOE.match(name) is not None


def is_input(name: str) -> bool:
    """Return whether llama.cpp keeps the tensor beside the CPU whatever is offloaded."""
    parsed = parse_name(name)
    return parsed.layer is None and PARTS.get(parsed.part, _OTHER).is_input


def sharers(name: str) -> tuple[str, ...]:
    """Return the names of weights that read the same activations as this one, itself left out.

    Whether the model has them is another question. Weights that read alone have none.
    """
    parsed = parse_name(name)
    reads = PARTS.get(parsed.part, _OTHER).reads
    if reads is None or parsed.layer is None or parsed.kind != "weight":
        return ()
    return tuple(
        f"{parsed.block}{part}.weight"
        for part, other in PARTS.items()
        if other.reads == reads and part != parsed.part
    )


def same_columns(name: str) -> str | None:
    """Return the name of the weight whose input has this one's columns, though other values.

    None where there is none but those that read the same activations (see sharers).
    """
    parsed = parse_name(name)
    other = _SAME_COLUMNS.get(parsed.part)
    if other is None or parsed.layer is None or parsed.kind != "weight":
        return None
    return f"{parsed.block}{other}.weight"


def draft_layers(names: Iterable[str]) -> frozenset[int]:
    """Return the layers that predict further tokens (multi-token prediction), by their parts."""
    parsed = (parse_name(name) for name in names)
    return frozenset(n.layer for n in parsed if n.layer is not None and n.part.startswith(_DRAFT))


def trunk_layers(names: Iterable[str], n_blocks: int | None, n_draft: int = 0) -> int | None:
    """Return how many layers the trunk has; None where neither metadata nor names tell.

    n_blocks is the architecture's block_count, n_draft its nextn_predict_layers: draft blocks
    count as blocks, and follow the trunk. A file may lack the key, or the blocks.
    """
    names = tuple(names)
    if n_blocks is None:
        layers = [layer for n in names if (layer := layer_of(n)) is not None]
        if not layers:
            return None
        n_blocks, n_draft = max(layers) + 1, 0
    return max(0, min(n_blocks - n_draft, *draft_layers(names), n_blocks))


def _n_dims(shape: tuple[int, ...]) -> int:
    """Return the number of dimensions as ggml counts them: without ones at the end."""
    return max((i for i, ne in enumerate(shape, start=1) if ne > 1), default=1)


def never_quantized(name: str, shape: tuple[int, ...], arch: str = "") -> str | None:
    """Return why llama.cpp never quantizes the tensor, or None if it may be quantized.

    shape is in ggml's order. Two rules are ours: llama.cpp's quantizer aborts on tensors of four
    dimensions, so they are kept; and in an mmproj file, whatever llama.cpp needs in full.
    """
    n_dims = _n_dims(shape)
    if n_dims < 2:
        return "one-dimensional"
    if n_dims > 3:
        return "four-dimensional"
    if not name.endswith("weight"):
        return "not a weight"
    if name in _KEPT_NAMES:
        return _KEPT_NAMES[name]
    kept = next((reason for part, reason in _KEPT_PARTS.items() if part in name), None)
    if kept is not None or arch not in PROJECTORS:
        return kept
    if n_dims > 2 and not is_of_experts(name):
        return _KEPT_IN_PROJECTORS["conv"]
    found = (reason for part, reason in _KEPT_IN_PROJECTORS.items() if part in name)
    return None if name.endswith(_POINTWISE) else next(found, None)
