"""Models made to be timed: random weights in one format, of the llama architecture.

What they say is nothing; how long it takes is what llama.cpp takes for as many weights of that
format. A few rows are encoded and repeated, so that a file is made as fast as it is written.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.gguf.header import Value, ValueType, ggml_type, string, u32
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights

_ALIGNMENT = 32
_N_VOCAB = 256
_TILE = 64  # rows that are encoded; all others repeat them
_HEAD = 64  # of attention


@dataclass(frozen=True)
class SpeedModel:
    """The shape of a model that is timed: n_layers of this width, all matrices in one format."""

    width: int
    n_layers: int

    @property
    def n_weights(self) -> int:
        """Weights that a token is multiplied with, in the format that is timed."""
        return sum(n * m for name, n, m in self._matrices() if name != "token_embd.weight")

    @staticmethod
    def of_bytes(n_bytes: int, width: int, format_name: str) -> "SpeedModel":
        """Return the smallest with this width whose weights take n_bytes or more."""
        one = SpeedModel(width, 1).n_weights
        per_layer = formats.row_bytes(format_name, width) * one // width
        return SpeedModel(width, max(1, -(-n_bytes // per_layer)))

    def _matrices(self) -> Iterator[tuple[str, int, int]]:
        """Yield the name, columns and rows of every matrix."""
        width, keys = self.width, max(_HEAD, self.width // 4)
        yield "token_embd.weight", width, _N_VOCAB
        yield "output.weight", width, _N_VOCAB
        for layer in range(self.n_layers):
            block = f"blk.{layer}."
            yield f"{block}attn_q.weight", width, width
            yield f"{block}attn_k.weight", width, keys
            yield f"{block}attn_v.weight", width, keys
            yield f"{block}attn_output.weight", width, width
            yield f"{block}ffn_gate.weight", width, 2 * width
            yield f"{block}ffn_up.weight", width, 2 * width
            yield f"{block}ffn_down.weight", 2 * width, width

    def _norms(self) -> Iterator[str]:
        yield "output_norm.weight"
        for layer in range(self.n_layers):
            yield f"blk.{layer}.attn_norm.weight"
            yield f"blk.{layer}.ffn_norm.weight"

    def write(self, path: Path, format_name: str) -> None:
        """Write the model; raises EngineError when the file cannot be written."""
        tiles = {n: _tile(format_name, n) for n in (self.width, 2 * self.width)}
        embedding = _tile("F16", self.width)
        infos, offset = [], 0
        sizes = []
        for name, columns, rows in self._matrices():
            is_embedding = name == "token_embd.weight"
            kind = "F16" if is_embedding else format_name
            n_bytes = formats.row_bytes(kind, columns) * rows
            infos.append(_info(name, (columns, rows), kind, offset))
            sizes.append((embedding if is_embedding else tiles[columns], rows, n_bytes))
            offset += n_bytes + -n_bytes % _ALIGNMENT
        for name in self._norms():
            infos.append(_info(name, (self.width,), "F32", offset))
            offset += 4 * self.width
        records = self._records()
        head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(records))
        header = head + b"".join((*records, *infos))
        ones = np.ones(self.width, np.float32).tobytes()
        try:
            with path.open("wb") as out:
                out.write(header + bytes(-len(header) % _ALIGNMENT))
                for tile, rows, n_bytes in sizes:
                    for start in range(0, rows, _TILE):
                        out.write(tile[: rows - start].tobytes())
                    out.write(bytes(-n_bytes % _ALIGNMENT))
                for _ in self._norms():
                    out.write(ones)
        except OSError as e:
            raise EngineError(
                f"{path}: a model of {offset} bytes to be timed cannot be written: {e.strerror}; "
                "set TMPDIR to a folder with room"
            ) from None

    def _records(self) -> list[bytes]:
        heads = self.width // _HEAD
        values = {
            "general.architecture": string("llama"),
            "llama.context_length": u32(4096),
            "llama.embedding_length": u32(self.width),
            "llama.block_count": u32(self.n_layers),
            "llama.feed_forward_length": u32(2 * self.width),
            "llama.attention.head_count": u32(heads),
            "llama.attention.head_count_kv": u32(max(1, self.width // 4 // _HEAD)),
            "llama.rope.dimension_count": u32(_HEAD),
            "llama.attention.layer_norm_rms_epsilon": Value(ValueType.FLOAT32, 1e-5),
            "llama.vocab_size": u32(_N_VOCAB),
            "tokenizer.ggml.model": string("none"),
        }
        return [value.record(key) for key, value in values.items()]


def _info(name: str, shape: tuple[int, ...], kind: str, offset: int) -> bytes:
    text = name.encode()
    return struct.pack(
        f"<Q{len(text)}sI{len(shape)}QIQ",
        len(text), text, len(shape), *shape, ggml_type(kind).id, offset,
    )  # fmt: skip


def _tile(format_name: str, columns: int) -> NDArray[np.uint8]:
    """Return _TILE rows of random weights in the format."""
    rng = np.random.default_rng(0)
    if format_name in formats.SOURCES_ONLY:  # any bytes are blocks; these have small scales
        return rng.integers(0, 64, (_TILE, formats.row_bytes(format_name, columns)), np.uint8)
    rows = rng.standard_normal((_TILE, columns), np.float32)
    rows *= np.float32(columns**-0.5)
    weights = ErrorWeights(np.ones((1, columns), np.float32), _TILE)
    return weights.encode(format_name, "F32", rows.view(np.uint8), 0, columns, "rtn")
