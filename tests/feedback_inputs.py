"""Inputs and weights for error feedback: correlated as activations are, heavy-tailed as weights."""

import numpy as np
from numpy.typing import NDArray

from ramgguf.quants.hessian import Hessian

Floats = NDArray[np.float32]


def correlated(n: int, n_tokens: int, seed: int) -> Floats:
    """Return inputs (tokens, n) of a low rank and some noise, as activations are."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((max(2, n // 8), n))
    x = rng.standard_normal((n_tokens, len(mixing))) @ mixing
    return (x + 0.3 * rng.standard_normal((n_tokens, n))).astype(np.float32)


def weights(n_rows: int, n: int, seed: int) -> Floats:
    """Return rows of weights, (rows, n)."""
    return np.random.default_rng(seed).standard_t(5, (n_rows, n)).astype(np.float32)


def hessian_of(n: int, seed: int) -> Hessian:
    """Return that of correlated inputs of n columns."""
    x = correlated(n, 4 * n, seed)
    return Hessian.of(x.T @ x, len(x))


def importance_of(hessian: Hessian) -> Floats:
    """Return the mean square of each column."""
    return np.ascontiguousarray(np.diag(hessian.mean))
