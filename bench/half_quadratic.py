"""Half-quadratic quantization (HQQ, Badri & Shaji 2023) into ggml's affine K-quants.

https://mobiusml.github.io/hqq_blog/: minimise φ(W − W_r) under an l_p norm, p < 1, by splitting off
the errors' outliers: e ← shrink(x − x̂), then the zero-point ← mean(q · s − (x − e)), scales fixed.
Only formats that have an offset can be fitted so: Q2_K, Q4_K and Q5_K; of others rtn's blocks stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

_NORM, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20  # the defaults of the authors' code


@dataclass(frozen=True)
class Layout:
    """Where a superblock of 256 weights has what: x̂ = d · scale · q − dmin · min.

    group is how many weights share scale and min, at the offset of the two F16 numbers.
    """

    group: int
    bits: int
    min_bits: int
    d_at: int
    scales_at: int
    scales_bytes: int


LAYOUTS: Mapping[str, Layout] = {
    "Q2_K": Layout(16, 2, 4, 80, 0, 16),
    "Q4_K": Layout(32, 4, 6, 0, 4, 12),
    "Q5_K": Layout(32, 5, 6, 0, 4, 12),
}


def fitted(name: str, blocks: Blocks, x: Floats) -> Blocks:
    """Return blocks (n, bytes) of x (n, 256) with rtn's scales, and offsets fitted to x."""
    layout = LAYOUTS[name]
    scale, least = _scales(layout, blocks)
    head = blocks[:, layout.d_at : layout.d_at + 4].copy().view(np.float16).astype(np.float32)
    step = (head[:, :1] * scale)[:, :, None]
    offset = (head[:, 1:] * least)[:, :, None]
    x = x.reshape(len(x), 256 // layout.group, layout.group)
    offset = _split(x, step, offset, (1 << layout.bits) - 1)[:, :, 0]
    # Mins are whole numbers of a step of the superblock, and not negative.
    most = (1 << layout.min_bits) - 1
    unit = (np.maximum(offset.max(axis=1), 0) / most).astype(np.float16)
    safe = np.where(unit > 0, unit.astype(np.float32), 1)[:, None]
    mins = np.clip(np.rint(offset / safe), 0, most) * (unit > 0)[:, None]
    codes = _codes(x, step, (unit.astype(np.float32)[:, None] * mins)[:, :, None], layout)
    return _packed(name, layout, blocks, unit, mins.astype(np.uint8), codes)


def _codes(x: Floats, step: Floats, offset: Floats, layout: Layout) -> NDArray[np.uint8]:
    safe = np.where(step > 0, step, 1)
    codes = np.clip(np.rint((x + offset) / safe), 0, (1 << layout.bits) - 1) * (step > 0)
    return codes.astype(np.uint8).reshape(len(x), 256)


def _split(x: Floats, step: Floats, offset: Floats, most: int) -> Floats:
    """Return the offsets that half-quadratic splitting finds, superblocks at their best step."""
    beta = np.float32(_BETA)
    safe = np.where(step > 0, step, 1)
    best, least = offset, np.full((len(x), 1, 1), np.inf, np.float32)
    for _ in range(_STEPS):
        level = step * np.clip(np.rint((x + offset) / safe), 0, most)
        error = x - (level - offset)
        size = np.abs(error)
        found = size.mean(axis=(1, 2), keepdims=True)
        best, least = np.where(found < least, offset, best), np.minimum(found, least)
        with np.errstate(divide="ignore"):
            shrunk = np.maximum(size - size ** np.float32(_NORM - 1) / beta, 0)
        outlier = np.sign(error) * np.nan_to_num(shrunk)
        offset = (level - (x - outlier)).mean(axis=2, keepdims=True)
        beta *= np.float32(_GROWTH)
    return best


def _scales(layout: Layout, blocks: Blocks) -> tuple[Floats, Floats]:
    """Return scales and mins (n, groups) as the whole numbers that they are stored as."""
    q = blocks[:, layout.scales_at : layout.scales_at + layout.scales_bytes]
    if layout.min_bits == 4:
        return (q & 15).astype(np.float32), (q >> 4).astype(np.float32)
    low, high, rest = q[:, :4], q[:, 4:8], q[:, 8:]
    scale = np.hstack([low & 63, (rest & 15) | (low >> 6 << 4)])
    least = np.hstack([high & 63, (rest >> 4) | (high >> 6 << 4)])
    return scale.astype(np.float32), least.astype(np.float32)


def _packed(
    name: str,
    layout: Layout,
    blocks: Blocks,
    unit: NDArray[np.float16],
    mins: NDArray[np.uint8],
    codes: NDArray[np.uint8],
) -> Blocks:
    """Return the blocks with other mins and codes."""
    out = blocks.copy()
    out[:, layout.d_at + 2 : layout.d_at + 4] = unit.reshape(-1, 1).view(np.uint8)
    q = out[:, layout.scales_at : layout.scales_at + layout.scales_bytes]
    if name == "Q2_K":
        q[:] = (q & 15) | (mins << 4)
        two = codes.reshape(len(codes), 2, 4, 32)
        out[:, 16:80] = (
            (two << (2 * np.arange(4, dtype=np.uint8))[:, None])
            .sum(axis=2, dtype=np.uint8)
            .reshape(len(codes), 64)
        )
        return out
    q[:, 4:8] = (mins[:, :4] & 63) | (mins[:, 4:] >> 4 << 6)
    q[:, 8:] = (q[:, 8:] & 15) | ((mins[:, 4:] & 15) << 4)
    pairs = codes.reshape(len(codes), 4, 2, 32)
    nibbles = (pairs[:, :, 0] & 15) | ((pairs[:, :, 1] & 15) << 4)
    out[:, -128:] = nibbles.reshape(len(codes), 128)
    if name == "Q5_K":
        fifth = (codes >> 4).reshape(len(codes), 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
        out[:, 16:48] = fifth.sum(axis=1, dtype=np.uint8)
    return out
