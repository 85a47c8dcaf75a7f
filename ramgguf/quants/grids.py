"""Weights that lie on a block format's grid already, and the blocks that hold them exactly.

Releases that were trained for Q4_0, MXFP4 checkpoints and dequantized INT4 come as F16, BF16 or
F32: each weight is a block's value, rounded to that type. What decodes to the same weights again,
after the same rounding, loses nothing; more bytes would hold nothing more.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants import formats

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

_BLOCK = 32
_N_VALUES = 16  # that a block of either format has, at most
# Codes of Q4_0 that a block's largest weight may have, the likeliest first.
_LARGEST = (-8, *(sign * k for k in range(7, 0, -1) for sign in (1, -1)))
GRIDS = ("MXFP4", "Q4_0")  # by ascending bytes
_ROWS_AT_ONCE = 1 << 20  # weights


def rounded(x: Floats, source: str) -> Floats:
    """Return the values as the source's type holds them."""
    if source == "F16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if source == "BF16":
        bits = x.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return ((bits + half) & np.uint32(0xFFFF0000)).view(np.float32)
    return x


def exact_blocks(name: str, weights: Floats, source: str) -> Blocks | None:
    """Return the blocks of a format that decode to these weights exactly; None if none do.

    weights has shape (rows, columns), float32, as the source's type holds them: decoded values are
    rounded to it before they are compared. NaN and infinity are on no grid.
    """
    if not np.isfinite(weights).all():
        return None
    n_bytes = formats.row_bytes(name, weights.shape[1])
    if name == "MXFP4":  # its encoder finds the power of two
        blocks = np.empty((len(weights), n_bytes), np.uint8)
        _core.encode(name, "F32", weights.view(np.uint8), blocks, encoder="rtn")
        back = np.empty_like(weights)
        _core.decode(name, blocks, back)
        return blocks if np.array_equal(rounded(back, source), weights) else None
    fitted = _scaled(weights.reshape(-1, _BLOCK), source)
    return None if fitted is None else _packed(*fitted).reshape(len(weights), n_bytes)


def grid_of(file: GGUFFile, tensor: TensorInfo, names: Sequence[str] = GRIDS) -> str | None:
    """Return the format of fewest bytes on whose grid all weights of a tensor lie; else None.

    The first row decides for nearly all tensors.
    """
    if tensor.type_name not in formats.FLOAT_FORMATS:
        return None
    suiting = [n for n in names if formats.suits(n, tensor.row_length)]
    if not suiting:
        return None
    first = _decoded(file, tensor, 0, 1)
    if not first.any():
        return None
    sorted_ = np.sort(first.reshape(-1, _BLOCK), axis=1)
    if ((np.diff(sorted_, axis=1) != 0).sum(axis=1) >= _N_VALUES).any():
        return None
    for name in suiting:
        if exact_blocks(name, first, tensor.type_name) is None:
            continue
        if all(exact_blocks(name, w, tensor.type_name) is not None for w in _parts(file, tensor)):
            return name
    return None


def encode(name: str, type_name: str, rows: Blocks) -> Blocks:
    """Return the exact blocks of rows, uint8 of the type named; ValueError if they are none."""
    width = formats.row_weights(type_name, rows.shape[1])
    weights = np.empty((len(rows), width), np.float32)
    _core.decode(type_name, rows, weights)
    blocks = exact_blocks(name, weights, type_name)
    if blocks is None:
        raise ValueError(f"weights do not lie on the grid of {name}")
    return blocks


def _decoded(file: GGUFFile, tensor: TensorInfo, start: int, stop: int) -> Floats:
    weights = np.empty((stop - start, tensor.row_length), np.float32)
    _core.decode(tensor.type_name, file.read_rows(tensor, start, stop), weights)
    return weights


def _parts(file: GGUFFile, tensor: TensorInfo) -> Iterator[Floats]:
    step = max(1, _ROWS_AT_ONCE // tensor.row_length)
    for start in range(0, tensor.n_rows, step):
        yield _decoded(file, tensor, start, min(start + step, tensor.n_rows))


def _scaled(x: Floats, source: str) -> tuple[NDArray[np.float16], NDArray[np.int32]] | None:
    """Return scales and codes of Q4_0 whose products, rounded as the source's, are x; else None.

    The largest weight of a block has one of few codes. Each gives the codes of all others, and
    these the scales with which every product rounds to its weight: an interval, of which the middle
    is tried (the F16 number nearest to it lies within if any does), and its neighbours, for ties.
    """
    scales = np.zeros(len(x), np.float16)
    codes = np.zeros(x.shape, np.int32)
    low, high = _bounds(x, source)
    open_ = np.flatnonzero(x.any(axis=1))
    for largest in _LARGEST:
        if not len(open_):
            break
        part = x[open_].astype(np.float64)
        extreme = np.take_along_axis(part, np.abs(part).argmax(axis=1)[:, None], 1)
        q = np.clip(np.rint(part * largest / extreme), -8, 7)
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([low[open_] / q, high[open_] / q])
        least = np.where(q == 0, -np.inf, ends.min(axis=0)).max(axis=1)
        most = np.where(q == 0, np.inf, ends.max(axis=0)).min(axis=1)
        with np.errstate(over="ignore"):
            d = ((least + most) / 2).astype(np.float16)
        found = np.zeros(len(open_), bool)
        for near in (d, np.nextafter(d, np.float16(np.inf)), np.nextafter(d, np.float16(-np.inf))):
            with np.errstate(over="ignore", invalid="ignore"):
                back = rounded(near.astype(np.float32)[:, None] * q.astype(np.float32), source)
            fits = ~found & (back == x[open_]).all(axis=1)
            scales[open_[fits]], codes[open_[fits]] = near[fits], q[fits]
            found |= fits
        open_ = open_[~found]
    return None if len(open_) else (scales, codes)


def _bounds(x: Floats, source: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return between which numbers a number rounds to each of x in the source's type."""
    if source == "F32":
        exact = x.astype(np.float64)
        return exact, exact
    if source == "F16":
        half = x.astype(np.float16)
        ends = [np.nextafter(half, np.float16(to)) for to in (-np.inf, np.inf)]
    else:
        bits = np.abs(x).view(np.uint32)
        step = np.uint32(1 << 16)
        smaller, larger = ((np.maximum(bits, step) - step), (bits + step))
        inner, outer = (b.view(np.float32) * np.sign(x) for b in (smaller, larger))
        ends = [np.minimum(inner, outer), np.maximum(inner, outer)]
    low, high = ((x.astype(np.float64) + end.astype(np.float64)) / 2 for end in ends)
    return low, high


def _packed(scales: NDArray[np.float16], codes: NDArray[np.int32]) -> Blocks:
    """Return the bytes of blocks of Q4_0, as in cpp/formats/q4_0.h."""
    d = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    q = (codes + 8).astype(np.uint8)
    return np.concatenate([d, q[:, :16] | q[:, 16:] << 4], axis=1)
