"""Tiny models that write something like English: what follows a character depends on it alone."""

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from gguf_samples import finish_gguf
from ramgguf.deploy.collapse_checks import KNOWN_TEXT
from tiny_models import BOS, FEED_FORWARD, WIDTH, add_byte_tokenizer

_FIRST_BYTE = 3  # of the tokens of tiny_models: after <unk>, <s>, </s>
_TEXT = KNOWN_TEXT.encode()
_COLUMNS = {byte: i for i, byte in enumerate(sorted(set(_TEXT)))}


def _probabilities(n_vocab: int) -> NDArray[np.float64]:
    """Return P(next token | column of the byte before), smoothed: shape (n_vocab, WIDTH)."""
    counts = np.full((n_vocab, WIDTH), 1e-4)
    for before, after in zip(_TEXT, _TEXT[1:] + _TEXT[:1], strict=True):
        counts[_FIRST_BYTE + after, _COLUMNS[before]] += 1
    counts[_FIRST_BYTE + ord("T"), len(_COLUMNS) :] += 1
    shares: NDArray[np.float64] = counts / counts.sum(axis=0)
    return shares


def write_bigram_model(
    path: Path,
    *,
    noise: float = 0.0,
    template: str | None = None,
    always: bytes | None = None,
    n_context: int = 1 << 20,
) -> Path:
    """Write a model of one layer that adds nothing, and return its path.

    noise is what is added to log-probabilities, in nats; always is a byte that follows everything.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"bigram {path.stem}")
    writer.add_context_length(n_context)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-6)
    n_vocab = add_byte_tokenizer(writer, "gpt2", add_bos=False, extra_tokens=0)
    if template is not None:
        writer.add_chat_template(template)
    logits = np.log(_probabilities(n_vocab))
    if always is not None:
        logits[_FIRST_BYTE + always[0]] += 50
    logits += noise * np.random.default_rng(BOS).standard_normal(logits.shape)
    embedding = np.zeros((n_vocab, WIDTH))
    for token in range(n_vocab):  # a row of one 8 has a mean square of 1, which the norm keeps
        embedding[token, _COLUMNS.get(token - _FIRST_BYTE, len(_COLUMNS))] = 8
    writer.add_tensor("token_embd.weight", embedding.astype(np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((WIDTH, WIDTH), np.float32))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((FEED_FORWARD, WIDTH), np.float32))
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((WIDTH, FEED_FORWARD), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output.weight", (logits / 8).astype(np.float32))
    finish_gguf(writer)
    return path
