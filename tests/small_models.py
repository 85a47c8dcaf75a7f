"""Small models with random weights of many architectures, without vocabularies, for llama.cpp."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, PoolingType

import ramgguf
from gguf_samples import finish_gguf
from tiny_models import add_byte_tokenizer

WIDTH, FFN, N_HEADS, HEAD, N_VOCAB, N_CONTEXT, N_LAYERS = 256, 512, 4, 64, 320, 64, 2
KV = 2 * HEAD  # two key/value heads
N_EXPERTS, EXPERT_FFN = 4, 256
INNER, STATE, CONV, DT_RANK = 512, 16, 4, 32  # of state-space models
Q_RANK, KV_RANK, NOPE, ROPE = 96, 64, 32, 32  # of multi-head latent attention
DECAY, ICLR, MIX, GATE = 32, 32, 32, 64  # the low ranks of RWKV

Shapes = dict[str, tuple[int, ...]]  # numpy's order: row length last
Stored = dict[str, tuple[np.ndarray, GGMLQuantizationType]]  # data as GGUFWriter takes them


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp asks of a model: hyperparameters and tensors."""

    name: str
    describe: Callable[[GGUFWriter], None]
    layer: Callable[[int], Shapes]
    outside: Shapes
    embeds: bool = False
    has_encoder: bool = False  # beside a decoder
    own_layers: int | None = None  # where it asks for another number

    @property
    def n_layers(self) -> int:
        return self.own_layers or N_LAYERS

    @property
    def has_experts(self) -> bool:
        return any("_exps" in name for name in self.layer(self.n_layers - 1))


def _weights(**shapes: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _biases(**shapes: tuple[int, ...]) -> Shapes:
    return {f"{name}.bias": shape for name, shape in shapes.items()}


def _both(**shapes: tuple[int, ...]) -> Shapes:
    """Weights, and biases as long as these have rows."""
    return _weights(**shapes) | _biases(**{name: shape[:1] for name, shape in shapes.items()})


ATTENTION = _weights(
    attn_norm=(WIDTH,),
    attn_q=(WIDTH, WIDTH),
    attn_k=(KV, WIDTH),
    attn_v=(KV, WIDTH),
    attn_output=(WIDTH, WIDTH),
)
QK_NORMS = _weights(attn_q_norm=(HEAD,), attn_k_norm=(HEAD,))
DENSE = _weights(
    ffn_norm=(WIDTH,), ffn_gate=(FFN, WIDTH), ffn_up=(FFN, WIDTH), ffn_down=(WIDTH, FFN)
)
EXPERTS = _weights(
    ffn_norm=(WIDTH,),
    ffn_gate_inp=(N_EXPERTS, WIDTH),
    ffn_gate_exps=(N_EXPERTS, EXPERT_FFN, WIDTH),
    ffn_up_exps=(N_EXPERTS, EXPERT_FFN, WIDTH),
    ffn_down_exps=(N_EXPERTS, WIDTH, EXPERT_FFN),
)
SHARED_EXPERTS = _weights(
    ffn_gate_shexp=(EXPERT_FFN, WIDTH),
    ffn_up_shexp=(EXPERT_FFN, WIDTH),
    ffn_down_shexp=(WIDTH, EXPERT_FFN),
)
TIED = _weights(token_embd=(N_VOCAB, WIDTH), output_norm=(WIDTH,))
UNTIED = TIED | _weights(output=(N_VOCAB, WIDTH))


def _common(
    out: GGUFWriter,
    n_heads: int = N_HEADS,
    n_kv_heads: int = 2,
    n_rope: int = HEAD,
    n_ff: int = FFN,
    n_layers: int | None = None,
) -> None:
    out.add_context_length(N_CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(n_ff)
    out.add_block_count(n_layers or N_LAYERS)
    out.add_head_count(n_heads)
    out.add_head_count_kv(n_kv_heads)
    out.add_rope_dimension_count(n_rope)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_layer_norm_eps(1e-5)


def _experts(out: GGUFWriter) -> None:
    out.add_expert_count(N_EXPERTS)
    out.add_expert_used_count(2)
    out.add_expert_feed_forward_length(EXPERT_FFN)


def _qwen3moe(out: GGUFWriter) -> None:
    _common(out)
    _experts(out)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)


def _mixtral(out: GGUFWriter) -> None:
    _common(out, n_ff=EXPERT_FFN)
    out.add_expert_count(N_EXPERTS)
    out.add_expert_used_count(2)


def _qwen2moe(out: GGUFWriter) -> None:
    _common(out)
    _experts(out)
    out.add_expert_shared_feed_forward_length(EXPERT_FFN)


def _llama4(out: GGUFWriter) -> None:
    _common(out, n_layers=4)
    _experts(out)
    out.add_interleave_moe_layer_step(1)


def _glm4moe(out: GGUFWriter, n_layers: int = N_LAYERS) -> None:
    _common(out, n_layers=n_layers)
    _experts(out)
    out.add_leading_dense_block_count(1)
    out.add_expert_shared_count(1)
    out.add_expert_weights_norm(True)
    out.add_expert_weights_scale(2.5)


def _gemma3(out: GGUFWriter) -> None:
    _common(out)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_sliding_window(32)


def _mamba(out: GGUFWriter) -> None:
    _common(out)
    out.add_ssm_conv_kernel(CONV)
    out.add_ssm_inner_size(INNER)
    out.add_ssm_state_size(STATE)
    out.add_ssm_time_step_rank(DT_RANK)


def _mamba2(out: GGUFWriter) -> None:
    _mamba(out)
    out.add_uint32("mamba2.ssm.group_count", 1)  # gguf 0.17 has no method for it


def _bert(out: GGUFWriter) -> None:
    _common(out, n_kv_heads=N_HEADS)
    out.add_causal_attention(False)
    out.add_pooling_type(PoolingType.MEAN)
    out.add_token_type_count(2)


def _deepseek2(out: GGUFWriter) -> None:
    _common(out, n_kv_heads=1, n_rope=ROPE)
    _experts(out)
    out.add_leading_dense_block_count(1)
    out.add_q_lora_rank(Q_RANK)
    out.add_kv_lora_rank(KV_RANK)
    out.add_key_length(KV_RANK + ROPE)
    out.add_value_length(KV_RANK)
    out.add_key_length_mla(NOPE + ROPE)
    out.add_value_length_mla(HEAD)
    out.add_expert_shared_count(1)
    out.add_expert_weights_scale(1.0)
    out.add_expert_weights_norm(True)


def _deepseek2_layer(layer: int) -> Shapes:
    attention = _weights(
        attn_norm=(WIDTH,),
        attn_q_a=(Q_RANK, WIDTH),
        attn_q_a_norm=(Q_RANK,),
        attn_q_b=(N_HEADS * (NOPE + ROPE), Q_RANK),
        attn_kv_a_mqa=(KV_RANK + ROPE, WIDTH),
        attn_kv_a_norm=(KV_RANK,),
        attn_k_b=(N_HEADS, KV_RANK, NOPE),
        attn_v_b=(N_HEADS, HEAD, KV_RANK),
        attn_output=(WIDTH, N_HEADS * HEAD),
    )
    return attention | (EXPERTS | SHARED_EXPERTS if layer else DENSE)


def _rwkv7(out: GGUFWriter) -> None:
    _common(out, n_heads=0, n_kv_heads=0)
    out.add_wkv_head_size(HEAD)
    out.add_decay_lora_rank(DECAY)
    out.add_iclr_lora_rank(ICLR)
    out.add_value_residual_mix_lora_rank(MIX)
    out.add_gate_lora_rank(GATE)


def _rwkv7_layer(layer: int) -> Shapes:
    square, column = (WIDTH, WIDTH), (1, 1, WIDTH)
    return _both(attn_norm=(WIDTH,), attn_norm_2=(WIDTH,), time_mix_ln=(WIDTH,)) | _weights(
        time_mix_w0=(WIDTH,),
        time_mix_w1=(DECAY, WIDTH),
        time_mix_w2=(WIDTH, DECAY),
        time_mix_a0=(WIDTH,),
        time_mix_a1=(ICLR, WIDTH),
        time_mix_a2=(WIDTH, ICLR),
        time_mix_v0=(WIDTH,),
        time_mix_v1=(MIX if layer else ICLR, WIDTH),
        time_mix_v2=(WIDTH, MIX if layer else ICLR),
        time_mix_g1=(GATE, WIDTH),
        time_mix_g2=(WIDTH, GATE),
        time_mix_lerp_fused=(6, *column),
        time_mix_k_k=(WIDTH,),
        time_mix_k_a=(WIDTH,),
        time_mix_r_k=(WIDTH,),
        time_mix_key=square,
        time_mix_value=square,
        time_mix_receptance=square,
        time_mix_output=square,
        channel_mix_lerp_k=column,
        channel_mix_key=(FFN, WIDTH),
        channel_mix_value=(WIDTH, FFN),
    )


GPT2_LAYER = _both(
    attn_norm=(WIDTH,),
    attn_qkv=(3 * WIDTH, WIDTH),
    attn_output=(WIDTH, WIDTH),
    ffn_norm=(WIDTH,),
    ffn_up=(FFN, WIDTH),
    ffn_down=(WIDTH, FFN),
)
BERT_LAYER = _both(
    attn_q=(WIDTH, WIDTH),
    attn_k=(WIDTH, WIDTH),
    attn_v=(WIDTH, WIDTH),
    attn_output=(WIDTH, WIDTH),
    attn_output_norm=(WIDTH,),
    ffn_up=(FFN, WIDTH),
    ffn_down=(WIDTH, FFN),
    layer_output_norm=(WIDTH,),
)
PHI3_LAYER = _weights(
    attn_norm=(WIDTH,),
    attn_qkv=(WIDTH + 2 * KV, WIDTH),
    attn_output=(WIDTH, WIDTH),
    ffn_norm=(WIDTH,),
    ffn_up=(2 * FFN, WIDTH),
    ffn_down=(WIDTH, FFN),
)
MAMBA_LAYER = (
    _weights(
        attn_norm=(WIDTH,),
        ssm_in=(2 * INNER, WIDTH),
        ssm_conv1d=(INNER, CONV),
        ssm_x=(DT_RANK + 2 * STATE, INNER),
        ssm_dt=(INNER, DT_RANK),
        ssm_out=(WIDTH, INNER),
    )
    | _biases(ssm_conv1d=(INNER,), ssm_dt=(INNER,))
    | {"ssm_a": (INNER, STATE), "ssm_d": (INNER,)}
)
MAMBA2_LAYER = (
    _weights(
        attn_norm=(WIDTH,),
        ssm_in=(2 * INNER + 2 * STATE + DT_RANK, WIDTH),
        ssm_conv1d=(INNER + 2 * STATE, CONV),
        ssm_norm=(1, INNER),
        ssm_out=(WIDTH, INNER),
    )
    | _biases(ssm_conv1d=(INNER + 2 * STATE,), ssm_dt=(DT_RANK,))
    | {"ssm_a": (DT_RANK, 1), "ssm_d": (DT_RANK, 1)}
)

_T5_OUTSIDE = _weights(
    **{"token_embd": (N_VOCAB, WIDTH), "enc.output_norm": (WIDTH,), "dec.output_norm": (WIDTH,)},
    output=(N_VOCAB, WIDTH),
)
N_BUCKETS = 32  # of distances between tokens, in T5


def _t5(out: GGUFWriter) -> None:
    _common(out, n_kv_heads=N_HEADS)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_relative_attn_buckets_count(N_BUCKETS)
    out.add_decoder_start_token_id(0)


def _t5_tensors() -> Shapes:
    """Encoder and decoder; the decoder's layers attend to what the encoder made, too."""
    square = (WIDTH, WIDTH)
    attention: Shapes = {"norm": (WIDTH,)} | dict.fromkeys(("q", "k", "v", "o"), square)
    feed_forward: Shapes = {"norm": (WIDTH,), "gate": (FFN, WIDTH), "up": (FFN, WIDTH)}
    shapes = dict(_T5_OUTSIDE)
    for i in range(N_LAYERS):
        for stack, blocks in {"enc": ("attn",), "dec": ("attn", "cross_attn")}.items():
            start = f"{stack}.blk.{i}."
            parts = {f"{block}_{k}": shape for block in blocks for k, shape in attention.items()}
            parts |= {f"ffn_{k}": shape for k, shape in feed_forward.items()}
            parts["ffn_down"] = (WIDTH, FFN)
            parts["attn_rel_b"] = (N_BUCKETS, N_HEADS)
            shapes |= _weights(**{start + k: shape for k, shape in parts.items()})
    return shapes


ARCHITECTURES = (
    Architecture("llama", _common, lambda _: ATTENTION | DENSE, UNTIED),
    Architecture(
        "qwen2",
        _common,
        lambda _: ATTENTION | DENSE | _biases(attn_q=(WIDTH,), attn_k=(KV,), attn_v=(KV,)),
        UNTIED,
    ),
    Architecture("qwen3", _gemma3, lambda _: ATTENTION | QK_NORMS | DENSE, TIED),
    Architecture("qwen3moe", _qwen3moe, lambda _: ATTENTION | QK_NORMS | EXPERTS, UNTIED),
    Architecture(
        "gemma3",
        _gemma3,
        lambda _: ATTENTION | QK_NORMS | DENSE
        | _weights(post_attention_norm=(WIDTH,), post_ffw_norm=(WIDTH,)),
        TIED,
    ),
    Architecture("phi3", _common, lambda _: PHI3_LAYER, UNTIED),
    Architecture("mamba", _mamba, lambda _: MAMBA_LAYER, UNTIED),
    Architecture("mamba2", _mamba2, lambda _: MAMBA2_LAYER, UNTIED),
    Architecture(
        "gpt2",
        lambda out: _common(out, n_kv_heads=N_HEADS),
        lambda _: GPT2_LAYER,
        UNTIED | _weights(position_embd=(N_CONTEXT, WIDTH)) | _biases(output_norm=(WIDTH,)),
    ),
    Architecture(
        "bert",
        _bert,
        lambda _: BERT_LAYER,
        _weights(token_embd=(N_VOCAB, WIDTH), position_embd=(N_CONTEXT, WIDTH),
                 token_types=(2, WIDTH)) | _both(token_embd_norm=(WIDTH,)),
        embeds=True,
    ),
    Architecture("deepseek2", _deepseek2, _deepseek2_layer, UNTIED),
    Architecture(
        "rwkv7", _rwkv7, _rwkv7_layer,
        UNTIED | _both(token_embd_norm=(WIDTH,)) | _biases(output_norm=(WIDTH,)),
    ),
    Architecture("t5", _t5, lambda _: {}, _t5_tensors(), has_encoder=True),
)  # fmt: skip

_QKV_BIASES = _biases(attn_q=(WIDTH,), attn_k=(KV,), attn_v=(KV,))
_BEFORE_EXPERTS = {"ffn_norm.weight": "post_attention_norm.weight"}


def _glm4moe_layer(layer: int) -> Shapes:
    experts = EXPERTS | SHARED_EXPERTS | {"exp_probs_b.bias": (N_EXPERTS,)}
    parts = ATTENTION | _QKV_BIASES | (experts if layer else DENSE)
    return {_BEFORE_EXPERTS.get(name, name): shape for name, shape in parts.items()}


DRAFT_LAYER = 2  # of the model that drafts: after its trunk


def _drafting(out: GGUFWriter) -> None:
    _glm4moe(out, DRAFT_LAYER + 1)
    out.add_nextn_predict_layers(1)


def _drafting_layer(layer: int) -> Shapes:
    parts = _glm4moe_layer(layer)
    if layer < DRAFT_LAYER:
        return parts
    nextn = {
        "eh_proj": (WIDTH, 2 * WIDTH), "enorm": (WIDTH,), "hnorm": (WIDTH,),
        "shared_head_norm": (WIDTH,),
    }  # fmt: skip
    return parts | _weights(**{f"nextn.{name}": shape for name, shape in nextn.items()})


# With a layer that drafts tokens (multi-token prediction).
DRAFTING = Architecture("glm4moe", _drafting, _drafting_layer, UNTIED, own_layers=DRAFT_LAYER + 1)

# Further mixtures of experts: llama's is Mixtral.
MIXTURES = (
    Architecture("llama", _mixtral, lambda _: ATTENTION | EXPERTS, UNTIED),
    Architecture(
        "qwen2moe",
        _qwen2moe,
        lambda _: ATTENTION | _QKV_BIASES | EXPERTS | SHARED_EXPERTS
        | _weights(ffn_gate_inp_shexp=(WIDTH,)),
        UNTIED,
    ),
    # Every fourth layer attends to all tokens.
    Architecture(
        "llama4", _llama4, lambda _: ATTENTION | EXPERTS | SHARED_EXPERTS, UNTIED, own_layers=4
    ),
    Architecture("glm4moe", _glm4moe, _glm4moe_layer, UNTIED),
)  # fmt: skip


def _tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from architecture.outside.items()
    for i in range(architecture.n_layers):
        for name, shape in architecture.layer(i).items():
            yield f"blk.{i}.{name}", shape


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    if name.endswith("ssm_a"):
        return -np.abs(x)  # a state that decays
    if "norm" in name or "time_mix_ln" in name:
        return (float(name.endswith("weight")) + 0.1 * x).astype(np.float32)
    if name.startswith(("enc.", "dec.")) and name.endswith("attn_q.weight"):
        x *= np.float32(HEAD**-0.5)  # T5's attention does not scale
    return x * np.float32(shape[-1] ** -0.5)


# What llama.cpp's graphs add to or multiply with activations, and routers, as converters know, too.
_IN_F32 = (
    *("norm", "conv1d", "lerp", "token_types", "position_embd", "attn_rel_b"),
    "ffn_gate_inp",
)


def _word_pieces() -> tuple[list[str], list[int]]:
    """Return a BERT vocabulary that spells every word, and its token types."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tokens = [*special, *(f"▁{c}" for c in letters), *letters]
    tokens += [f"▁w{i}" for i in range(N_VOCAB - len(tokens))]
    return tokens, [3] * len(special) + [1] * (N_VOCAB - len(special))


def _add_tokenizer(out: GGUFWriter, architecture: Architecture) -> None:
    """Add a tokenizer of N_VOCAB tokens: word pieces between [CLS] and [SEP], or bytes."""
    if architecture.name != "bert":
        add_byte_tokenizer(out, "gpt2", add_bos=False, extra_tokens=N_VOCAB - 260)
        return
    tokens, types = _word_pieces()
    out.add_tokenizer_model("bert")
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_pad_token_id(0)
    out.add_unk_token_id(1)
    out.add_bos_token_id(2)
    out.add_sep_token_id(3)
    out.add_eos_token_id(3)


def write_small_model(
    path: Path,
    architecture: Architecture,
    seed: int = 0,
    *,
    tokenizer: bool = False,
    pooling: PoolingType | None = None,
    noise: float = 0.0,
    stored: Callable[[str, np.ndarray], Stored | None] = lambda *_: None,
) -> Path:
    """Write a model with matrices in F16, the rest in F32; return its path.

    tokenizer gives it one; pooling makes an embedding model of a decoder; noise, as a share of
    each weight's scale, makes a worse copy of it. stored says what is written in place of a tensor,
    if anything: names, data and types.
    """
    perturb = np.random.default_rng(seed + 1)
    rng = np.random.default_rng(seed)
    out = GGUFWriter(path, architecture.name)
    out.add_name(f"small {architecture.name}")
    architecture.describe(out)
    out.add_vocab_size(N_VOCAB)
    if tokenizer:
        _add_tokenizer(out, architecture)
    else:
        out.add_tokenizer_model("none")
    if pooling is not None:
        out.add_pooling_type(pooling)
    for name, shape in _tensors(architecture):
        x = _values(name, shape, rng)
        if noise and x.ndim > 1:
            x += noise * x.std() * perturb.standard_normal(shape, np.float32)
        if (other := stored(name, x)) is not None:
            for own, (data, kind) in other.items():
                out.add_tensor(own, data, raw_dtype=kind)
            continue
        half = x.ndim > 1 and name.endswith("weight") and not any(p in name for p in _IN_F32)
        out.add_tensor(name, x.astype(np.float16) if half else x)
    finish_gguf(out)
    return path


def planned_types(source: Path, target: Path) -> dict[str, str]:
    """Quantize the model to 6 bits per weight, and return the format of each tensor."""
    made = ramgguf.quantize(
        source, "6bpw", target, min_sqnr_db=0, threads=1, verify=False, effort="fast"
    )
    return {a.name: a.format for a in made.plan.assignments}
