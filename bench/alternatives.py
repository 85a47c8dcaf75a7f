"""Two encoders of the literature in ggml's blocks: optimal clipping, half-quadratic splitting.

Clipping only chooses what rtn is given; half-quadratic splitting changes rtn's blocks.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import half_quadratic as hqq
from ramgguf import _core
from ramgguf.gguf.reader import TensorInfo, open_gguf
from ramgguf.quants import formats

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_ROWS = 1024
_SUB_BLOCK = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16}  # weights that share a scale; else 32


def write_alternative(path: Path, source: Path, encoder: str) -> None:
    """Replace the blocks of every quantized tensor in the file by those of the encoder."""
    encode = {"clip": clip, "hqq": half_quadratic}[encoder]
    with open_gguf(source) as before, open_gguf(path) as after:
        data = np.memmap(path, np.uint8, mode="r+")
        for tensor in before.tensors:
            target = after.tensor(tensor.name)
            if target.type_name == tensor.type_name:
                continue
            for start in range(0, tensor.n_rows, _ROWS):
                stop = min(start + _ROWS, tensor.n_rows)
                rows = before.read_rows(tensor, start, stop)
                blocks = encode(target.type_name, _floats(tensor, rows))
                at = target.offset + start * target.row_bytes
                data[at : at + blocks.size] = blocks.reshape(-1)
        data.flush()


def _floats(tensor: TensorInfo, rows: Blocks) -> Floats:
    out = np.empty((len(rows), tensor.row_length), np.float32)
    _core.decode(tensor.type_name, rows, out)
    return out


def _rounded(name: str, x: Floats) -> Blocks:
    """Return the blocks that rtn makes."""
    blocks = np.empty((len(x), formats.row_bytes(name, x.shape[1])), np.uint8)
    _core.encode(name, "F32", np.ascontiguousarray(x).view(np.uint8), blocks, encoder="rtn")
    return blocks


def clip(name: str, x: Floats) -> Blocks:
    """Return, block by block, rtn's blocks of the weights clipped where the error is least.

    Each group of weights with a scale of its own is clipped at the same share of its range; the
    share is chosen for every block (superblock).
    """
    block = formats.get(name).block_size
    groups = x.reshape(-1, _SUB_BLOCK.get(name, 32))
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    best: Blocks | None = None
    least = np.full(x.size // block, np.inf)
    for share in _CLIPS:
        clipped = np.clip(groups, share * low, share * high).reshape(x.shape)
        blocks, out = _rounded(name, clipped), np.empty_like(x)
        _core.decode(name, blocks, out)
        error = np.square(x - out).reshape(len(least), block).sum(axis=1)
        better = error < least
        least = np.where(better, error, least)
        made = blocks.reshape(len(least), -1)
        best = made if best is None else np.where(better[:, None], made, best)
    assert best is not None
    return best.reshape(len(x), -1)


def half_quadratic(name: str, x: Floats) -> Blocks:
    """Return rtn's blocks, with the offsets of half-quadratic splitting where there are some."""
    blocks = _rounded(name, x)
    if name not in hqq.LAYOUTS:
        return blocks
    made = hqq.fitted(name, blocks.reshape(x.size // 256, -1), x.reshape(-1, 256))
    return made.reshape(blocks.shape)
