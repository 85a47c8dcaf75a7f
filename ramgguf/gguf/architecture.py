"""What a tensor is for, told from its name, and which tensors are never quantized.

Names are those of llama.cpp: `blk.<layer>.<part>.weight` within layers, `<part>.weight` outside.
"""

import re
from collections.abc import Mapping

_LAYER = re.compile(r"^(?:(?P<stack>enc|dec)\.)?blk\.(?P<layer>\d+)\.(?P<rest>.+)$")

# Parts whose role is not simply their own name.
_ROLES: Mapping[str, str] = {
    "token_embd": "embedding",
    "per_layer_token_embd": "embedding",
    "nextn.embed_tokens": "embedding",
    "output": "head",
    "nextn.shared_head_head": "head",
    "attn_o": "attn_output",
    "attn_out": "attn_output",
    "cross_attn_o": "cross_attn_output",
    "attn_q_a": "attn_q",
    "attn_q_b": "attn_q",
    "attn_kv_a_mqa": "attn_kv",
    "attn_kv_b": "attn_kv",
    "attn_k_b": "attn_k",
    "attn_v_b": "attn_v",
    "ffn_gate_inp": "router",
    "ffn_gate_inp_shexp": "router",
    "ffn_gate_tid2eid": "router",
    "altup_router": "router",
}

# Parts that name their role themselves.
_OWN_ROLE = re.compile(
    r"(?:cross_)?attn_(?:q|k|v|qkv|output|gate)"
    r"|ffn_(?:gate|up|down|gate_up)(?:_exps|_shexp|_chexps)?"
    r"|ssm_\w+|shortconv\.\w+|time_mix_\w+|channel_mix_\w+|indexer\.\w+|nextn\.\w+"
)

_NORM = re.compile(r"(?:^|[._])(?:norm\w*|ln\d?|enorm|hnorm)$|_norm(?:_\w+)?$")

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
# All that never_quantized says.
NEVER_QUANTIZED = frozenset(
    (
        *("one-dimensional", "four-dimensional", "not a weight"),
        *_KEPT_PARTS.values(),
        *_KEPT_NAMES.values(),
    )
)


def layer_of(name: str) -> int | None:
    """Return the number of the layer that the tensor belongs to; None outside of layers."""
    match = _LAYER.match(name)
    return int(match["layer"]) if match else None


def role_of(name: str, arch: str = "") -> str:
    """Return what the tensor is for: 'embedding', 'head', 'attn_q', 'ffn_down_exps', 'norm', ...

    Tensors that fit no role are 'other', biases 'bias'. The architecture is for roles that names
    alone do not tell; up to now they do.
    """
    del arch
    match = _LAYER.match(name)
    part, _, kind = (match["rest"] if match else name).rpartition(".")
    if kind != "weight":
        part = part if kind in ("bias", "scale") else f"{part}.{kind}".lstrip(".")
    if _NORM.search(part):
        return "norm"
    if kind == "bias":
        return "bias"
    if part in _ROLES:
        return _ROLES[part]
    return part if _OWN_ROLE.fullmatch(part) else "other"


def _n_dims(shape: tuple[int, ...]) -> int:
    """Return the number of dimensions as ggml counts them: without ones at the end."""
    return max((i for i, ne in enumerate(shape, start=1) if ne > 1), default=1)


def never_quantized(name: str, shape: tuple[int, ...], arch: str = "") -> str | None:
    """Return why llama.cpp never quantizes the tensor, or None if it may be quantized.

    shape is in ggml's order. One rule is ours: llama.cpp's quantizer walks two- and
    three-dimensional tensors only, so that those of four dimensions are kept.
    """
    del arch
    n_dims = _n_dims(shape)
    if n_dims < 2:
        return "one-dimensional"
    if n_dims > 3:
        return "four-dimensional"
    if not name.endswith("weight"):
        return "not a weight"
    if name in _KEPT_NAMES:
        return _KEPT_NAMES[name]
    return next((reason for part, reason in _KEPT_PARTS.items() if part in name), None)
