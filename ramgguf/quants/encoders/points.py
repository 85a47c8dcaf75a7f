"""Error feedback for formats whose codes stand for 4 or 8 weights: IQ3_S, IQ3_XXS, IQ2_*.

A group of weights is scale · sign · point, where the point is one of a format's codebook. As in
QuIP#'s LDLQ (Tseng et al. 2024, arXiv 2402.04396), a group is rounded at once, to the nearest point
under its own part of the Hessian, and its error is handed on to later columns. The scales are those
that `search` gives the superblock when the sweep reaches it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import UNIT

_EIGHT = 8

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]
Ints = NDArray[np.integer]


@dataclass(frozen=True)
class _Layout:
    """Where the superblocks of a format (n, bytes) hold what.

    fields reads the scales' fields f, (n, 256 / sub_block), of which a scale is d · (2 f + 1).
    put writes the points, (n, 256 / group), and signs, (n, 32), of which bit i of byte b is set
    where weight 8 b + i is negative.
    """

    group: int
    n_points: int
    even_signs: bool
    fields: Callable[[Blocks], Ints]
    put: Callable[[Blocks, Ints, Blocks], None]


def _nibbles(packed: Blocks) -> Ints:
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


def _last_bits(words: Blocks) -> Ints:
    """Return the upper four bits of each word of 32 bits."""
    return np.ascontiguousarray(words).view("<u4") >> 28


def _put_signs_of_32(words: Blocks, signs: Blocks) -> None:
    """Write seven of each eight signs into words of 32 bits, whose upper four bits remain."""
    seven = (signs.reshape(len(signs), -1, 4) & 127).astype(np.uint32)
    packed = (seven << np.array([0, 7, 14, 21], np.uint32)).sum(axis=-1, dtype=np.uint32)
    kept = np.ascontiguousarray(words).view("<u4") & np.uint32(0xF0000000)
    words[:] = (kept | packed).astype("<u4").view(np.uint8)


def _put_iq3_s(blocks: Blocks, points: Ints, signs: Blocks) -> None:
    blocks[:, 2:66] = points & 255
    blocks[:, 66:74] = np.packbits((points >> 8).astype(np.uint8), axis=1, bitorder="little")
    blocks[:, 74:106] = signs


def _put_iq3_xxs(blocks: Blocks, points: Ints, signs: Blocks) -> None:
    blocks[:, 2:66] = points
    _put_signs_of_32(blocks[:, 66:98], signs)


def _put_iq2_s(blocks: Blocks, points: Ints, signs: Blocks) -> None:
    blocks[:, 2:34] = points & 255
    blocks[:, 34:66] = signs
    high = (points >> 8).reshape(len(points), -1, 4) << np.array([0, 2, 4, 6])
    blocks[:, 66:74] = high.sum(axis=-1)


def _put_iq2_xs(blocks: Blocks, points: Ints, signs: Blocks) -> None:
    words = points.astype("<u2") | (signs & 127).astype("<u2") << 9
    blocks[:, 2:66] = words.view(np.uint8)


def _put_iq2_xxs(blocks: Blocks, points: Ints, signs: Blocks) -> None:
    # Eight words: four bytes of points, then a word of signs and scale, in turn.
    words = blocks[:, 2:].reshape(len(blocks), 8, 8)
    words[:, :, :4] = points.reshape(len(points), 8, 4)
    of_signs = np.ascontiguousarray(words[:, :, 4:]).reshape(len(blocks), 32)
    _put_signs_of_32(of_signs, signs)
    words[:, :, 4:] = of_signs.reshape(len(blocks), 8, 4)
    blocks[:, 2:] = words.reshape(len(blocks), 64)


_LAYOUTS = {
    "IQ3_S": _Layout(4, 512, False, lambda b: _nibbles(b[:, 106:110]), _put_iq3_s),
    "IQ3_XXS": _Layout(4, 256, True, lambda b: _last_bits(b[:, 66:98]), _put_iq3_xxs),
    "IQ2_S": _Layout(8, 1024, False, lambda b: _nibbles(b[:, 74:82]), _put_iq2_s),
    "IQ2_XS": _Layout(8, 512, True, lambda b: _nibbles(b[:, 66:74]), _put_iq2_xs),
    "IQ2_XXS": _Layout(
        8, 256, True, lambda b: _last_bits(b[:, 2:].reshape(-1, 8, 8)[:, :, 4:].reshape(-1, 32)),
        _put_iq2_xxs,
    ),
}  # fmt: skip
FORMATS = frozenset(_LAYOUTS)


def round_unit(
    type_name: str, x: Floats, factor: Floats, importance: Floats
) -> tuple[Blocks, Floats]:
    """Return the superblocks of 256 columns x (rows, 256), and each column's error.

    x is changed in place. factor and the errors are those of _core.round_unit. Raises ValueError
    where a scale would overflow.
    """
    layout = _LAYOUTS[type_name]
    blocks = searched(type_name, np.ascontiguousarray(x), importance)
    points = np.empty((len(x), UNIT // layout.group), np.uint16)
    signs = np.empty((len(x), UNIT // _EIGHT), np.uint8)
    errors = np.empty((len(x), UNIT), np.float32)
    magnitudes = _magnitudes(type_name)
    _core.round_points(
        x, factor, _scales(layout, blocks), magnitudes, layout.even_signs, points, signs, errors
    )
    layout.put(blocks, points.astype(np.int64), signs)
    return blocks, errors


def searched(type_name: str, rows: Floats, importance: Floats) -> Blocks:
    """Return the blocks of the rows without feedback: those of `search`, or libggml's."""
    if not formats.get(type_name).encodable:
        return libggml.encode(type_name, rows, importance)
    blocks = np.empty((len(rows), formats.row_bytes(type_name, rows.shape[1])), np.uint8)
    raw = rows.view(np.uint8)
    _core.encode(type_name, "F32", raw, blocks, encoder="search", importance=importance)
    return blocks


def _scales(layout: _Layout, blocks: Blocks) -> Floats:
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return np.ascontiguousarray(d * (2 * layout.fields(blocks) + 1).astype(np.float32))


@cache
def _magnitudes(type_name: str) -> Floats:
    """Return the codebook, (group, points): what the decoder makes of each point with scale 1."""
    layout = _LAYOUTS[type_name]
    per_block = UNIT // layout.group
    points = np.arange(layout.n_points).reshape(-1, per_block)
    blocks = np.zeros((len(points), formats.row_bytes(type_name, UNIT)), np.uint8)
    blocks[:, :2] = np.array([1], "<f2").view(np.uint8)
    layout.put(blocks, points, np.zeros((len(points), UNIT // _EIGHT), np.uint8))
    values = decode_rows(type_name, blocks, UNIT)
    return np.ascontiguousarray(values.reshape(-1, layout.group).T)
