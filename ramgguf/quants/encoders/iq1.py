"""Error feedback for IQ1_S and IQ1_M, whose codes stand for 8 weights, and which libggml encodes.

A group of 8 weights is scale · (point + offset): the point one of 2048 with elements -1, 0 and 1,
the offset 1/8 or -1/8, which IQ1_S has for 32 weights and IQ1_M for each group. As in points.py, a
group is rounded at once, to the nearest point under its own part of the Hessian. Scales, and the
offsets of IQ1_S, are those that libggml gives the superblock when the sweep reaches it.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml

FORMATS = frozenset({"IQ1_S", "IQ1_M"})
UNIT = 256
_GROUP, _N_GROUPS, _N_POINTS = 8, 32, 2048
_OFFSET = np.float32(0.125)
_ROWS_AT_ONCE = 128  # whose distances to all points stay in the cache

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]
Ints = NDArray[np.int64]


def round_unit(
    type_name: str, x: Floats, factor: Floats, importance: Floats
) -> tuple[Blocks, Floats]:
    """Return the superblocks of 256 columns x (rows, 256), and each column's error.

    x is changed in place. factor and the errors are those of _core.round_unit. Raises FormatError
    where libggml is missing.
    """
    blocks = libggml.encode(type_name, np.ascontiguousarray(x), importance)
    errors = np.empty(x.shape, np.float32)
    groups = [_group(type_name, factor, g) for g in range(_N_GROUPS)]
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        _round(type_name, x[part], factor, groups, blocks[part], errors[part])
    return blocks, errors


def _group(type_name: str, factor: Floats, g: int) -> tuple[Floats, Floats]:
    """Return what makes a group's errors e of differences, and what makes distances of targets.

    x - q = e U, so what counts is the length of e = (x - q) U⁻¹. For a target y and a point c, both
    times U⁻¹, (y, 1) times the second is |y - c|² / 2 less |y|² / 2, (9, 2048).
    """
    at = slice(_GROUP * g, _GROUP * (g + 1))
    inverse = np.linalg.inv(factor[at, at].astype(np.float64)).astype(np.float32)
    c = _book(type_name) @ inverse
    return inverse, np.concatenate([-c.T, 0.5 * np.einsum("ij,ij->i", c, c)[None]])


def _round(
    type_name: str,
    x: Floats,
    factor: Floats,
    groups: Sequence[tuple[Floats, Floats]],
    blocks: Blocks,
    errors: Floats,
) -> None:
    """Put the nearest points into blocks, and fill errors."""
    scales, signs = _scales(type_name, blocks)
    points = np.empty((len(x), _N_GROUPS), np.int64)
    book = _book(type_name)
    rows, ones = np.arange(len(x)), np.ones((len(x), 1), np.float32)
    distances = np.empty((len(x), _N_POINTS), np.float32)
    for g, (inverse, to_distances) in enumerate(groups):
        at = slice(_GROUP * g, _GROUP * (g + 1))
        scale = scales[:, g, None]
        target = np.divide(x[:, at], scale, out=np.zeros_like(x[:, at]), where=scale != 0)
        given = _OFFSET * signs[:, g, None]
        offset, least = given.copy(), np.full(len(x), np.inf, np.float32)
        for tried in (given,) if type_name == "IQ1_S" else (given, -given):
            y = (target - tried) @ inverse
            np.matmul(np.concatenate([y, ones], axis=1), to_distances, out=distances)
            nearest = distances.argmin(axis=1)
            found = distances[rows, nearest] + 0.5 * np.einsum("ij,ij->i", y, y)
            closer = found < least
            points[closer, g], least[closer] = nearest[closer], found[closer]
            offset[closer] = tried[closer]
        signs[:, g] = np.where(offset[:, 0] < 0, -1, 1)
        error = (x[:, at] - scale * (book[points[:, g]] + offset)) @ inverse
        errors[:, at] = error
        x[:, at.stop :] -= error @ factor[at, at.stop :]
    _put(type_name, blocks, points, signs < 0)


def _words(part: Blocks) -> Ints:
    return np.ascontiguousarray(part).view("<u2").astype(np.int64)


def _scales(type_name: str, blocks: Blocks) -> tuple[Floats, Ints]:
    """Return the scale and the offset's sign of each group, (rows, 32)."""
    if type_name == "IQ1_S":
        d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        words = _words(blocks[:, 34:])
        fields = words >> 12 & 7
        signs = np.where(words >> 15, -1, 1).repeat(4, axis=1)
        return (d * (2 * fields + 1).astype(np.float32)).repeat(4, axis=1), signs
    words = _words(blocks[:, 48:])
    bits = (words >> 12) << np.array([0, 4, 8, 12])
    d = bits.sum(axis=1, keepdims=True).astype("<u2").view("<f2").astype(np.float32)
    fields = (words[:, :, None] >> np.array([0, 3, 6, 9]) & 7).reshape(len(blocks), -1)
    nibbles = np.stack((blocks[:, 32:48] & 15, blocks[:, 32:48] >> 4), axis=-1)
    signs = np.where(nibbles.reshape(len(blocks), -1) & 8, -1, 1)
    return (d * (2 * fields + 1).astype(np.float32)).repeat(2, axis=1), signs


def _put(type_name: str, blocks: Blocks, points: Ints, negative: NDArray[np.bool_]) -> None:
    """Write the points and the offsets' signs; scales remain."""
    high = points >> 8
    if type_name == "IQ1_S":
        blocks[:, 2:34] = points & 255
        fields = (high.reshape(len(points), -1, 4) << np.array([0, 3, 6, 9])).sum(axis=-1)
        words = _words(blocks[:, 34:]) & 0xF000 | fields
        blocks[:, 34:] = words.astype("<u2").view(np.uint8)
        return
    blocks[:, :32] = points & 255
    nibbles = (high | negative << 3).reshape(len(points), -1, 2)
    blocks[:, 32:48] = nibbles[:, :, 0] | nibbles[:, :, 1] << 4


@cache
def _book(type_name: str) -> Floats:
    """Return the points, (2048, 8), as libggml decodes them."""
    points = np.arange(_N_POINTS).reshape(-1, _N_GROUPS)
    blocks = np.zeros((len(points), formats.row_bytes(type_name, UNIT)), np.uint8)
    one = np.array([1], "<f2").view("<u2").astype(np.int64)[0]
    if type_name == "IQ1_S":
        blocks[:, :2] = np.array([1], "<f2").view(np.uint8)
    else:
        words = (one >> np.array([0, 4, 8, 12]) & 15) << 12
        blocks[:, 48:] = words.astype("<u2").view(np.uint8)
    _put(type_name, blocks, points, np.zeros(points.shape, bool))
    values = libggml.decode(type_name, blocks, UNIT)
    return np.ascontiguousarray(values.reshape(-1, _GROUP) - _OFFSET)
