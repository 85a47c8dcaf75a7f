"""Weights changed for the inputs that quantized layers before them leave, before they are rounded.

GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (arXiv 2505.11695): with inputs x of the model
and x̂ of what is quantized so far, the W' whose outputs W'x̂ are nearest to Wx is
W + W·Σ(x − x̂)x̂ᵀ·(Σx̂x̂ᵀ)⁻¹. All of that change fits the calibration tokens too closely
(CoreQ, arXiv 2602.05902; docs/findings.md): a share of it, the strength, is taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.quants.hessian import Hessian, add_grams, mirror

Floats = NDArray[np.float32]


class InputSums:
    """Σx̂x̂ᵀ and Σ(x − x̂)x̂ᵀ of inputs of n columns, added up by so many threads."""

    def __init__(self, n: int, threads: int) -> None:
        self._gram = np.zeros((n, n), np.float32)
        self._cross = np.zeros((n, n), np.float32)
        self._threads = threads
        self._n_tokens = 0

    def add(self, x: Floats, x_hat: Floats) -> None:
        """Add inputs of the model and of what is quantized so far, both (tokens, n)."""
        from scipy.linalg.blas import sgemm
        from threadpoolctl import threadpool_limits

        if x.shape != x_hat.shape or x.shape[1] != len(self._gram):
            raise ValueError(f"inputs {x.shape} and {x_hat.shape} of {len(self._gram)} columns")
        if not len(x):
            return
        x_hat = np.ascontiguousarray(x_hat)
        add_grams([(x_hat, self._gram)], self._threads)
        lost = np.subtract(x, x_hat)
        with threadpool_limits(self._threads, user_api="blas"):
            # Arrays in Fortran's order are their transposes in C's: crossᵀ grows by x̂ᵀ(x − x̂).
            sgemm(1.0, x_hat.T, lost.T, beta=1.0, c=self._cross.T, trans_b=1, overwrite_c=1)
        self._n_tokens += len(x)

    def changed_inputs(self, scales: Floats | None = None) -> "ChangedInputs":
        """Return what rounding needs of the inputs; scales are what these were divided by.

        The sums are used up. Raises ValueError where inputs are not finite.
        """
        mirror(self._gram)
        if scales is not None:  # of the inputs themselves, as Hessian.of takes it
            self._gram *= scales
            self._gram *= scales[:, None]
        hessian = Hessian.of(self._gram, self._n_tokens, scales=scales)
        self._cross /= np.float32(self._n_tokens)
        return ChangedInputs(hessian, self._cross, self._threads)


@dataclass(frozen=True)
class ChangedInputs:
    """The Hessian of inputs x̂, and the mean of (x − x̂)x̂ᵀ, (n, n)."""

    hessian: Hessian
    cross: Floats
    threads: int

    def corrector(self, n_rows: int, strength: float) -> Callable[[Floats], Floats]:
        """Return what takes rows of weights (rows, n), of n_rows in all, to those to be rounded."""
        if n_rows < len(self.cross):
            return lambda rows: rows + np.float32(strength) * self._solved(rows @ self.cross)
        change = self._solved(self.cross)
        change *= np.float32(strength)
        return lambda rows: rows + rows @ change

    def _solved(self, rows: Floats) -> Floats:
        """Return rows times the inverse of the damped H = GGᵀ."""
        from scipy.linalg import solve_triangular
        from threadpoolctl import threadpool_limits

        root = self.hessian.root
        with threadpool_limits(self.threads, user_api="blas"):
            half = solve_triangular(root, rows.T, check_finite=False)
            whole = solve_triangular(root, half, trans="T", overwrite_b=True, check_finite=False)
        return np.ascontiguousarray(whole.T)
