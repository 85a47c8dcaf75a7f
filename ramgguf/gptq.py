"""GPTQ: columns rounded in turn, the later ones making up for the errors of the earlier.

Frantar et al. 2022 (arXiv 2210.17323) with real ggml blocks: scales are fitted when the sweep
enters a block or superblock. H is XᵀX of the weight's inputs; the error that counts is that of the
output, Σ eHeᵀ over the rows e of W − Q.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core, formats

UNIT = 256
DAMPING = 0.01  # of the mean of H's diagonal: that of the paper's code

Floats = NDArray[np.float32]
FORMATS = frozenset(_core.gptq_formats())


@dataclass(frozen=True)
class Hessian:
    """What error feedback needs of a weight's inputs.

    mean is XᵀX over the number of inputs, (n, n); factor is U, upper triangular, with
    (mean + damping)⁻¹ = UᵀU.
    """

    mean: Floats
    factor: Floats

    @staticmethod
    def of(gram: Floats, n_tokens: int, damping: float = DAMPING) -> "Hessian":
        """Return it for XᵀX over n_tokens inputs; inputs that never were active count as others."""
        from scipy.linalg import cholesky
        from scipy.linalg.lapack import dtrtri

        mean = gram.astype(np.float64) / n_tokens
        damped = mean.copy()
        diagonal = damped.diagonal().copy()
        typical = diagonal.mean() if diagonal.any() else 1.0
        np.fill_diagonal(damped, np.where(diagonal > 0, diagonal, typical) + damping * typical)
        # Of H with its order reversed the lower factor is, reversed, an upper R with H = RRᵀ;
        # then H⁻¹ = UᵀU with U = R⁻¹.
        lower = cholesky(damped[::-1, ::-1], lower=True, overwrite_a=True, check_finite=False)
        upper, _ = dtrtri(np.asfortranarray(lower[::-1, ::-1]), lower=0)
        factor = np.triu(upper).astype(np.float32)
        return Hessian(mean.astype(np.float32), np.ascontiguousarray(factor))

    def error(self, difference: Floats) -> float:
        """Return Σ eHeᵀ over the rows e of a difference: that of the output, per input."""
        return float(self.errors(difference).sum())

    def errors(self, difference: Floats) -> NDArray[np.float64]:
        """Return eHeᵀ of each row e of a difference."""
        product = difference @ self.mean
        found: NDArray[np.float64] = np.einsum("ij,ij->i", product, difference, dtype=np.float64)
        return found


def encode(type_name: str, rows: Floats, hessian: Hessian, importance: Floats) -> NDArray[np.uint8]:
    """Return blocks of the rows, in a format of FORMATS; importance (columns) weighs scales.

    Rows are rounded independently of each other. Where error feedback makes a row's output worse
    than search does, the row is search's. Raises ValueError where a scale would overflow.
    """
    swept = _swept(type_name, rows, hessian, importance)
    searched = np.empty_like(swept)
    raw = np.ascontiguousarray(rows, np.float32).view(np.uint8)
    _core.encode(type_name, "F32", raw, searched, encoder="search", importance=importance)
    worse = _errors(type_name, swept, rows, hessian) > _errors(type_name, searched, rows, hessian)
    swept[worse] = searched[worse]
    return swept


def _errors(
    type_name: str, blocks: NDArray[np.uint8], rows: Floats, hessian: Hessian
) -> NDArray[np.float64]:
    decoded = np.empty(rows.shape, np.float32)
    _core.decode(type_name, blocks, decoded)
    return hessian.errors(rows - decoded)


def _swept(type_name: str, rows: Floats, hessian: Hessian, importance: Floats) -> NDArray[np.uint8]:
    n_rows, n_columns = rows.shape
    left = np.ascontiguousarray(rows, np.float32).copy()
    blocks = np.empty((n_rows, formats.row_bytes(type_name, n_columns)), np.uint8)
    at = 0
    for start in range(0, n_columns, UNIT):
        stop = min(start + UNIT, n_columns)
        factor = np.eye(UNIT, dtype=np.float32)
        factor[: stop - start, : stop - start] = hessian.factor[start:stop, start:stop]
        weights = np.zeros(UNIT, np.float32)
        weights[: stop - start] = importance[start:stop]
        out = np.empty((n_rows, formats.row_bytes(type_name, stop - start)), np.uint8)
        errors = np.empty((n_rows, stop - start), np.float32)
        _core.round_unit(type_name, left[:, start:stop], factor, weights, out, errors)
        if stop < n_columns:
            left[:, stop:] -= errors @ hessian.factor[start:stop, stop:]
        blocks[:, at : at + out.shape[1]] = out
        at += out.shape[1]
    return blocks
