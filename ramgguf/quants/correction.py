"""Weights changed for the inputs that quantized layers before them leave, before they are rounded.

GPTAQ (Li et al. 2025, arXiv 2504.02692) and Qronos (arXiv 2505.11695): with inputs x of the model
and x̂ of what is quantized so far, the W' whose outputs W'x̂ are nearest to Wx is
W + W·Σ(x − x̂)x̂ᵀ·(Σx̂x̂ᵀ)⁻¹. That fits the calibration tokens too closely (CoreQ, arXiv 2602.05902):
it makes outputs of other tokens worse. So the inverse has a ridge that is as large as the mean of
its diagonal, and of the change a share is taken, the strength, that is measured for each weight:
from either half of the tokens comes a change, and the other half tells how much of it helps.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.quants.hessian import add_grams, mirror

RIDGE = 1.0  # of the mean of Σx̂x̂ᵀ's diagonal (docs/findings.md)
_MEASURED_ROWS = 256  # of a weight that tell its strength

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class _Half:
    """The means of x̂x̂ᵀ and (x − x̂)x̂ᵀ, (n, n), over half of the tokens."""

    gram: Floats
    cross: Floats


class InputSums:
    """Σx̂x̂ᵀ and Σ(x − x̂)x̂ᵀ of inputs of n columns, of two halves of the tokens."""

    def __init__(self, n: int, threads: int) -> None:
        self._halves = [_Half(*np.zeros((2, n, n), np.float32)) for _ in range(2)]
        self._n_tokens = [0, 0]
        self._n, self._threads = n, threads

    def add(self, half: int, x: Floats, x_hat: Floats) -> None:
        """Add inputs of the model and of what is quantized so far, both (tokens, n), to a half.

        Raises ValueError for other shapes.
        """
        from scipy.linalg.blas import sgemm
        from threadpoolctl import threadpool_limits

        if x.shape != x_hat.shape or x.shape[1] != self._n:
            raise ValueError(f"inputs {x.shape} and {x_hat.shape} of {self._n} columns")
        if not len(x):
            return
        sums, x_hat = self._halves[half], np.ascontiguousarray(x_hat)
        add_grams([(x_hat, sums.gram)], self._threads)
        lost = np.subtract(x, x_hat)
        with threadpool_limits(self._threads, user_api="blas"):
            # Arrays in Fortran's order are their transposes in C's: crossᵀ grows by x̂ᵀ(x − x̂).
            sgemm(1.0, x_hat.T, lost.T, beta=1.0, c=sums.cross.T, trans_b=1, overwrite_c=1)
        self._n_tokens[half] += len(x)

    def changed_inputs(self) -> "ChangedInputs":
        """Return what the sums tell of the inputs; they are used up.

        Raises ValueError where there are no tokens in a half.
        """
        if not all(self._n_tokens):
            raise ValueError("there are no tokens in a half of them")
        for sums, n_tokens in zip(self._halves, self._n_tokens, strict=True):
            mirror(sums.gram)
            for array in (sums.gram, sums.cross):
                array /= np.float32(n_tokens)
        return ChangedInputs(tuple(self._halves), tuple(self._n_tokens), self._threads)


@dataclass(frozen=True)
class ChangedInputs:
    """Of both halves of the tokens: what inputs x̂ are, and what they have lost."""

    halves: tuple[_Half, ...]
    n_tokens: tuple[int, ...]
    threads: int

    def corrected(self, weights: Floats) -> Floats:
        """Return the weights to be rounded in place of these (rows, n)."""
        strength = self.strength(weights)
        if strength == 0:
            return weights
        shares = [np.float32(n / sum(self.n_tokens)) for n in self.n_tokens]
        gram = sum(s * h.gram for s, h in zip(shares, self.halves, strict=True))
        cross = sum(s * h.cross for s, h in zip(shares, self.halves, strict=True))
        change = self._change(weights, np.asarray(gram), np.asarray(cross))
        change *= np.float32(strength)
        change += weights
        return change

    def strength(self, weights: Floats) -> float:
        """Return the share of the change to be taken, from 0 to 1, for these weights (rows, n).

        The share s that leaves the least error on tokens which the change was not made from,
        measured on each half for the change by the other. Both halves make a change that has half
        of their noise: 2s / (1 + s) of that.
        """
        step = max(1, len(weights) // _MEASURED_ROWS)
        helps, costs = self.tried(np.ascontiguousarray(weights[::step]))
        if not (helps > 0 and costs > 0):
            return 0.0
        share = min(1.0, helps / costs)
        return 2 * share / (1 + share)

    def tried(self, rows: Floats) -> tuple[float, float]:
        """Return what a share s of each half's change does to the squared output error of rows
        (rows, n) on the other half: it is lowered by 2 s of the first number, raised by s² of the
        second. Sums over both halves.
        """
        helps, costs = 0.0, 0.0
        for own, other in (self.halves, self.halves[::-1]):
            change = self._change(rows, own.gram, own.cross)
            helps += float(np.vdot(change, rows @ other.cross))
            costs += float(np.vdot(change @ other.gram, change))
        return helps, costs

    def _change(self, rows: Floats, gram: Floats, cross: Floats) -> Floats:
        """Return rows · cross · (gram + ridge)⁻¹."""
        from scipy.linalg import cho_factor, cho_solve
        from threadpoolctl import threadpool_limits

        with threadpool_limits(self.threads, user_api="blas"):
            ridged = gram.copy()
            np.fill_diagonal(ridged, ridged.diagonal() + RIDGE * ridged.diagonal().mean())
            factor = cho_factor(ridged, overwrite_a=True, check_finite=False)
            if len(rows) < len(gram):
                solved = cho_solve(factor, (rows @ cross).T, overwrite_b=True, check_finite=False)
                return np.ascontiguousarray(solved.T)
            solved = cho_solve(factor, cross.T, check_finite=False)
            return np.asarray(rows @ solved.T)
