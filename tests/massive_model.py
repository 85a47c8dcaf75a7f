"""A tiny model whose BOS carries a massive activation: block 0 makes it, block 2 takes it back.

Column MASSIVE of the residual stream is SIZE after block 0, for BOS alone, and 0 again after block
2, if that block's weights are what they should be: formats of few bits leave a part of it.
"""

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from gguf_samples import finish_gguf
from tiny_models import BOS, N_HEADS, add_byte_tokenizer

WIDTH, FEED_FORWARD, N_LAYERS = 64, 128, 4
MARK, MASSIVE = 0, 1  # columns that no other weight writes
MADE_IN, TAKEN_BACK_IN = 0, 2
SIZE = 600.0
IDLE = 32  # hidden units that no token excites, a block of columns of ffn_down
N_SPARE = 8000  # tokens, so that three matrices are 2 % of the file

Floats = NDArray[np.float32]


def _silu(x: float) -> float:
    return x / (1 + float(np.exp(-x)))


def write_massive_model(path: Path) -> Path:
    """Write the model and return its path."""
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_HEADS)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    n_vocab = add_byte_tokenizer(writer, "gpt2", True, N_SPARE)

    def random(n_rows: int, n_columns: int, scale: float) -> Floats:
        return rng.standard_normal((n_rows, n_columns), dtype=np.float32) * np.float32(scale)

    def add(name: str, weights: Floats) -> None:
        writer.add_tensor(f"{name}.weight", weights.astype(np.float16))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    embedding = random(n_vocab, WIDTH, 1.0)
    embedding[:, [MARK, MASSIVE]] = 0
    embedding[BOS, MARK] = 8
    add("token_embd", embedding)
    marked = 8 / float(np.sqrt(np.mean(np.square(embedding[BOS]))))  # as block 0 normalizes it
    whole = float(np.sqrt(WIDTH))  # a column that is all of the vector, normalized
    for layer in range(N_LAYERS):
        block = f"blk.{layer}."
        norm(block + "attn_norm")
        for part in ("attn_q", "attn_k", "attn_v"):
            add(block + part, random(WIDTH, WIDTH, 0.1))
        for part, n in (("attn_output", WIDTH), ("ffn_down", FEED_FORWARD)):
            weights = random(WIDTH, n, 0.05)
            weights[[MARK, MASSIVE]] = 0
            if part == "ffn_down":
                weights[:, :2] = 0
                if layer == MADE_IN:
                    weights[MASSIVE, 0] = SIZE / (_silu(16 * marked) * 16 * marked)
                if layer == TAKEN_BACK_IN:
                    back = SIZE / (_silu(4 * whole) * 4 * whole)
                    weights[MASSIVE, :IDLE] = random(1, IDLE, back)  # what few bits must fit, too
                    weights[MASSIVE, 0] = -back
            add(block + part, weights)
        norm(block + "ffn_norm")
        for part in ("ffn_gate", "ffn_up"):
            weights = random(FEED_FORWARD, WIDTH, 0.1)
            weights[:IDLE] = 0
            weights[:, [MARK, MASSIVE]] = 0
            if layer == MADE_IN:
                weights[0, MARK] = 16
            if layer == TAKEN_BACK_IN:
                if part == "ffn_gate":  # ffn_up closes the unit for all tokens but BOS
                    weights[0] = random(1, WIDTH, 4.0)
                weights[0, MASSIVE] = 4
            add(block + part, weights)
    norm("output_norm")
    add("output", random(n_vocab, WIDTH, 0.3))
    finish_gguf(writer)
    return path
