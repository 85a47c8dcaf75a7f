"""Tiny models with random weights, of the llama architecture, that llama.cpp loads at once."""

from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from gguf.quants import quantize

from gguf_samples import finish_gguf

WIDTH, FEED_FORWARD, N_LAYERS, N_HEADS = 64, 128, 2, 2
BOS, EOS = 1, 2


def _byte_level_tokens() -> list[str]:
    """Return the 256 characters that stand for bytes in GPT-2's vocabularies, byte 0 first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def add_byte_tokenizer(
    writer: gguf.GGUFWriter, kind: Literal["gpt2", "llama"], add_bos: bool, extra_tokens: int
) -> int:
    """Add a tokenizer that knows bytes and little else; return how many tokens it has."""
    special = ["<unk>", "<s>", "</s>"]
    spare = [f"<spare{i}>" for i in range(extra_tokens)]
    normal, control, byte, unknown = 1, 3, 6, 2
    types = [unknown, control, control, *[byte if kind == "llama" else normal] * 256]
    if kind == "gpt2":
        tokens = special + _byte_level_tokens()
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b"])
        tokens.append("ab")
        types.append(normal)
    else:
        tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁t", "e"]
        types += [normal] * 3
    tokens += spare
    types += [control] * len(spare)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(add_bos)
    return len(tokens)


def write_tiny_model(
    path: Path,
    *,
    seed: int = 0,
    weight_type: str = "F32",
    tokenizer: Literal["gpt2", "llama"] = "gpt2",
    add_bos: bool = False,
    extra_tokens: int = 0,
    noise: float = 0.0,
    nan_in_output: bool = False,
    add_eos: bool = False,
    n_layers: int = N_LAYERS,
) -> Path:
    """Write a model and return its path; noise perturbs the weights that the seed gives."""
    rng, perturb = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"tiny {path.stem}")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    n_vocab = add_byte_tokenizer(writer, tokenizer, add_bos, extra_tokens)
    if add_eos:
        writer.add_add_eos_token(True)
    wanted = gguf.GGMLQuantizationType[weight_type]

    def matrix(name: str, n_rows: int, n_columns: int, scale: float) -> None:
        weights = rng.standard_normal((n_rows, n_columns), dtype=np.float32) * np.float32(scale)
        weights += perturb.standard_normal(weights.shape, dtype=np.float32) * np.float32(
            noise * scale
        )
        if nan_in_output and name == "output.weight":
            weights[7, 3] = np.nan
        writer.add_tensor(name, quantize(weights, wanted), raw_dtype=wanted)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, dtype=np.float32))

    matrix("token_embd.weight", n_vocab, WIDTH, 1.0)
    for layer in range(n_layers):
        block = f"blk.{layer}."
        norm(block + "attn_norm.weight")
        for part in ("q", "k", "v", "output"):
            matrix(block + f"attn_{part}.weight", WIDTH, WIDTH, 0.3)
        norm(block + "ffn_norm.weight")
        matrix(block + "ffn_gate.weight", FEED_FORWARD, WIDTH, 0.2)
        matrix(block + "ffn_up.weight", FEED_FORWARD, WIDTH, 0.2)
        matrix(block + "ffn_down.weight", WIDTH, FEED_FORWARD, 0.2)
    norm("output_norm.weight")
    matrix("output.weight", n_vocab, WIDTH, 0.3)
    finish_gguf(writer)
    return path
