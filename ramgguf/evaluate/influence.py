"""Influential sequences: the few without which two criteria agree about two models."""

from collections.abc import Callable

import numpy as np

from ramgguf.evaluate.statistics import DIVERGENCES, STATISTICS, FloatArray

_MAX_INFLUENTIAL = 0.1  # of the sequences; more of them are the text, not an exception
_LIKE_THE_WORST = 0.25  # a sequence with this much of the worst one's influence is named with it

DifferenceOf = Callable[[str, FloatArray], FloatArray]


def influential_sequences(x: str, y: str, n: int, difference: DifferenceOf) -> tuple[int, ...]:
    """Return positions of the fewest of n sequences without which x and y agree about a pair.

    difference(criterion, counts) is that of the two models under each row of counts. Empty when a
    tenth of the sequences is not enough. Where each criterion has such sequences, those that stand
    out more from the others are the cause. Quantiles are not searched: removing a sequence moves
    them wherever it lies.
    """
    found = [
        _pullers(c, x, y, n, difference)
        for c in (x, y)
        if c in DIVERGENCES or STATISTICS[c].quantile is None
    ]
    return tuple(sorted(max(found, default=(0.0, set[int]()), key=lambda f: f[0])[1]))


def _pullers(
    criterion: str, x: str, y: str, n: int, difference: DifferenceOf
) -> tuple[float, set[int]]:
    """Return the sequences that pull the criterion its way, and how far they stand out."""
    n_most = max(1, int(_MAX_INFLUENTIAL * n))
    if n_most >= n:
        return 0.0, set()
    whole = float(difference(criterion, np.ones((1, n)))[0])
    influence = (whole - difference(criterion, 1 - np.eye(n))) * np.sign(whole)
    order = np.argsort(-influence, kind="stable")
    kept = np.ones((n_most, n))
    for k in range(n_most):
        kept[k, order[: k + 1]] = 0
    agree = difference(x, kept) * difference(y, kept) > 0
    if not agree.any():
        return 0.0, set()
    fewest = int(np.argmax(agree)) + 1
    n_alike = int(np.count_nonzero(influence >= _LIKE_THE_WORST * influence[order[0]]))
    if fewest < n_alike <= n_most and agree[n_alike - 1]:
        fewest = n_alike
    typical = float(np.median(np.abs(influence))) or np.finfo(np.float64).tiny
    return influence[order[0]] / typical, {int(i) for i in order[:fewest]}
