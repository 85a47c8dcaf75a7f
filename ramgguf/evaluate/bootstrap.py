"""Uncertainty of the robust statistics: bootstrap over sequences, paired tests, many at once."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.statistics import (
    FloatArray,
    IntArray,
    Sample,
    SequenceLosses,
    Statistic,
    n_units,
)

_CHUNK = 1000  # resamples at once: keeps a chunk of counts in the cache

CountArray = IntArray | FloatArray
S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; low and high are None where none is claimed."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference; p is the two-sided bootstrap p-value of no difference."""

    p: float | None = None


def resample(sample: Sample, rng: np.random.Generator, n_resamples: int = 10_000) -> IntArray:
    """Return counts[n_resamples, n]: how often each sequence is in a draw with replacement.

    Sequences of one group (article) are drawn together: their losses are not independent.
    """
    n = n_units(sample)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.int64)
    if sample.group is None:
        return drawn
    return drawn[:, np.unique(sample.group, return_inverse=True)[1]]


def distribution(statistic: Statistic[S], sample: S, counts: CountArray) -> FloatArray:
    """Return the statistic of every resample, float64[len(counts)]."""
    parts = [
        statistic.function(sample, counts[i : i + _CHUNK].astype(np.float64))
        for i in range(0, len(counts), _CHUNK)
    ]
    return np.concatenate(parts)


def estimate(statistic: Statistic[S], sample: S, counts: IntArray) -> Estimate:
    """Return the statistic with its percentile-bootstrap 95 % interval, where one is honest."""
    value = statistic.of(sample)
    if not statistic.has_interval(sample):
        return Estimate(value)
    low, high = np.quantile(distribution(statistic, sample, counts), (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def paired_difference(statistic: Statistic[S], a: S, b: S, counts: IntArray) -> Difference:
    """Return statistic(a) − statistic(b) where both scored the same sequences, resampled together.

    p counts resamples on the other side of 0, with the added one that keeps it above zero
    (Davison & Hinkley 1997, equation 4.11). Raises ResultError when the sequences differ.
    """
    _check_paired(a, b)
    value = statistic.of(a) - statistic.of(b)
    if not (statistic.has_interval(a) and statistic.has_interval(b)):
        return Difference(value)
    drawn = distribution(statistic, a, counts) - distribution(statistic, b, counts)
    return difference(value, drawn)


def difference(value: float, drawn: FloatArray) -> Difference:
    """Return the difference with the interval and the p-value that its resamples give."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    one_sided = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
    p = min(1.0, 2 * (one_sided + 1) / (len(drawn) + 1))
    return Difference(value, float(low), float(high), p)


def delta_nll(a: SequenceLosses, b: SequenceLosses) -> FloatArray:
    """Return the mean NLL of a minus that of b per sequence, nats per token."""
    _check_paired(a, b)
    return a.mean_nll - b.mean_nll


def wilcoxon_p(a: SequenceLosses, b: SequenceLosses) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test on ΔNLL.

    Takes sequences as independent; with articles that span several it is a little too sure.
    """
    from scipy import stats  # takes half a second, which other commands need not wait

    delta = delta_nll(a, b)
    return float(stats.wilcoxon(delta).pvalue) if delta.any() else 1.0


def holm(p: FloatArray) -> FloatArray:
    """Return the p-values adjusted for their number (Holm 1979); compare them with 0.05."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _check_paired(a: Sample, b: Sample) -> None:
    if not np.array_equal(a.n_tokens, b.n_tokens):
        raise ResultError(
            f"paired statistics need the same sequences; found {len(a.n_tokens)} and"
            f" {len(b.n_tokens)} with different token counts"
        )
