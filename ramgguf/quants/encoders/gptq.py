"""GPTQ: columns rounded in turn, the later ones making up for the errors of the earlier.

Frantar et al. 2022 (arXiv 2210.17323) with real ggml blocks: scales are fitted when the sweep
enters a block or superblock. H is XᵀX of the weight's inputs; the error that counts is that of the
output, Σ eHeᵀ over the rows e of W − Q.
"""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.quants import formats
from ramgguf.quants.encoders import iq1, points
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.encoders.encoder import Encoder
from ramgguf.quants.hessian import UNIT, Hessian

Floats = NDArray[np.float32]
SCALAR_FORMATS = frozenset(_core.gptq_formats())
FORMATS = SCALAR_FORMATS | points.FORMATS | iq1.FORMATS


def encode(type_name: str, rows: Floats, hessian: Hessian, importance: Floats) -> NDArray[np.uint8]:
    """Return blocks of the rows, in a format of FORMATS; importance (columns) weighs scales.

    Rows are rounded independently of each other. Where error feedback makes a row's output worse
    than search does, the row is search's. Raises ValueError where a scale would overflow.
    """
    swept, handed_on, off = _swept(type_name, rows, hessian, importance)
    searched = points.searched(type_name, np.ascontiguousarray(rows, np.float32), importance)
    off_searched = rows - decode_rows(type_name, searched, rows.shape[1])
    error = handed_on - _of_damping(hessian, off)
    worse = error > hessian.damped_errors(off_searched) - _of_damping(hessian, off_searched)
    swept[worse] = searched[worse]
    return swept


def _of_damping(hessian: Hessian, difference: Floats) -> NDArray[np.float64]:
    """Return what damping adds to eHeᵀ of each row e of a difference."""
    found: NDArray[np.float64] = np.einsum(
        "ij,ij,j->i", difference, difference, hessian.damping, dtype=np.float64
    )
    return found


def _swept(
    type_name: str, rows: Floats, hessian: Hessian, importance: Floats
) -> tuple[NDArray[np.uint8], NDArray[np.float64], Floats]:
    """Return blocks, eHeᵀ of each row's error e for the damped H, and the errors.

    With H = GGᵀ, G upper triangular, eHeᵀ is the sum of the squares of eG. Column k of eG depends
    on columns up to k only, so each unit is rounded for what the units before it have left of its
    part: their errors times G. Within the unit, U = G⁻¹ hands errors on.
    """
    n_rows, n_columns = rows.shape
    handed_on = np.zeros(n_rows)
    off = np.ascontiguousarray(rows, np.float32).copy()
    blocks = np.empty((n_rows, formats.row_bytes(type_name, n_columns)), np.uint8)
    at = 0
    for start, factor in zip(range(0, n_columns, UNIT), hessian.units, strict=True):
        stop = min(start + UNIT, n_columns)
        weights = np.zeros(UNIT, np.float32)
        weights[: stop - start] = importance[start:stop]
        x = off[:, start:stop].copy()
        if start:
            before = off[:, :start] @ hessian.root[:start, start:stop]
            x += before @ factor[: stop - start, : stop - start]
        out, errors = _rounded(type_name, x, factor, weights)
        handed_on += np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
        off[:, start:stop] -= decode_rows(type_name, out, stop - start)
        blocks[:, at : at + out.shape[1]] = out
        at += out.shape[1]
    return blocks, handed_on, off


def _rounded(
    type_name: str, x: Floats, factor: Floats, importance: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Return the blocks of up to 256 columns x, changed in place, and each column's error."""
    if type_name in points.FORMATS:
        return points.round_unit(type_name, x, factor, importance)
    if type_name in iq1.FORMATS:
        return iq1.round_unit(type_name, x, factor, importance)
    out = np.empty((len(x), formats.row_bytes(type_name, x.shape[1])), np.uint8)
    errors = np.empty(x.shape, np.float32)
    _core.round_unit(type_name, x, factor, importance, out, errors)
    return out, errors


ENCODER = Encoder(
    "gptq",
    "error feedback (needs Hessians)",
    kernel="search",
    encode_output=encode,
    output_formats=FORMATS,
    plans_by="search",
)
