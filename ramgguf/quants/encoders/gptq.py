"""GPTQ: columns rounded in turn, the later ones making up for the errors of the earlier.

Frantar et al. 2022 (arXiv 2210.17323) with real ggml blocks: scales are fitted when the sweep
enters a block or superblock. H is XᵀX of the weight's inputs; the error that counts is that of the
output, Σ eHeᵀ over the rows e of W − Q.
"""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.quants import formats
from ramgguf.quants.encoders import points
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.encoders.encoder import Encoder
from ramgguf.quants.hessian import Hessian

UNIT = 256

Floats = NDArray[np.float32]
SCALAR_FORMATS = frozenset(_core.gptq_formats())
FORMATS = SCALAR_FORMATS | points.FORMATS


def encode(type_name: str, rows: Floats, hessian: Hessian, importance: Floats) -> NDArray[np.uint8]:
    """Return blocks of the rows, in a format of FORMATS; importance (columns) weighs scales.

    Rows are rounded independently of each other. Where error feedback makes a row's output worse
    than search does, the row is search's. Raises ValueError where a scale would overflow.
    """
    swept, handed_on = _swept(type_name, rows, hessian, importance)
    searched = points.searched(type_name, np.ascontiguousarray(rows, np.float32), importance)
    # Σ of what a sweep hands on, squared, is eHeᵀ of the damped H: no product with H is needed.
    left = _difference(type_name, swept, rows)
    error = handed_on - np.einsum("ij,ij,j->i", left, left, hessian.damping, dtype=np.float64)
    worse = error > hessian.errors(_difference(type_name, searched, rows))
    swept[worse] = searched[worse]
    return swept


def _difference(type_name: str, blocks: NDArray[np.uint8], rows: Floats) -> Floats:
    return rows - decode_rows(type_name, blocks, rows.shape[1])


def _swept(
    type_name: str, rows: Floats, hessian: Hessian, importance: Floats
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return blocks, and Σ (e Uᵢᵢ⁻¹)² of what each row hands on: eHeᵀ of the damped H."""
    n_rows, n_columns = rows.shape
    handed_on = np.zeros(n_rows)
    left = np.ascontiguousarray(rows, np.float32).copy()
    blocks = np.empty((n_rows, formats.row_bytes(type_name, n_columns)), np.uint8)
    at = 0
    for start in range(0, n_columns, UNIT):
        stop = min(start + UNIT, n_columns)
        factor = np.eye(UNIT, dtype=np.float32)
        factor[: stop - start, : stop - start] = hessian.factor[start:stop, start:stop]
        weights = np.zeros(UNIT, np.float32)
        weights[: stop - start] = importance[start:stop]
        out, errors = _rounded(type_name, left[:, start:stop], factor, weights)
        handed_on += np.einsum("ij,ij->i", errors, errors, dtype=np.float64)
        if stop < n_columns:
            left[:, stop:] -= errors @ hessian.factor[start:stop, stop:]
        blocks[:, at : at + out.shape[1]] = out
        at += out.shape[1]
    return blocks, handed_on


def _rounded(
    type_name: str, x: Floats, factor: Floats, importance: Floats
) -> tuple[NDArray[np.uint8], Floats]:
    """Return the blocks of up to 256 columns x, changed in place, and each column's error."""
    if type_name in points.FORMATS:
        return points.round_unit(type_name, x, factor, importance)
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
