"""Intervals over independent units (articles, or sequences where there are none).

Ratios and means: the delete-one-unit jackknife with Student's t, on the logarithm of what is
positive. It is cluster-robust (CV3 of MacKinnon, Nielsen & Webb 2023, Journal of Econometrics 232)
and covers from eight units on, where percentile and BCa bootstraps are too narrow.
Quantiles: Woodruff's interval (1952, JASA 47), the t interval of the share below, read back.
Shares, of sequences and of tokens: Clopper-Pearson with the effective number of observations (Korn
& Graubard 1998, Survey Methodology 24), so that none leaves 0 to 1.
Ratios of two quantiles, which no jackknife can do: a bootstrap standard error.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.statistics import (
    MIN_UNITS,
    FloatArray,
    IntArray,
    Sample,
    Statistic,
    n_units,
    unit_numbers,
)

_COVERAGE = 0.95
_CHUNK = 1000  # resamples at once: keeps a chunk of counts in the cache

CountArray = IntArray | FloatArray
S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; low and high are None where none is claimed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


def resample(sample: Sample, rng: np.random.Generator, n_resamples: int) -> IntArray:
    """Return counts[n_resamples, n]: how often each sequence is in a draw with replacement.

    Sequences of one unit are drawn together: their losses are not independent.
    """
    n = n_units(sample)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.int64)
    return drawn if sample.group is None else drawn[:, unit_numbers(sample)]


def distribution(statistic: Statistic[S], sample: S, counts: CountArray) -> FloatArray:
    """Return the statistic under each row of counts, float64[len(counts)]."""
    parts = [
        statistic.function(sample, counts[i : i + _CHUNK].astype(np.float64))
        for i in range(0, len(counts), _CHUNK)
    ]
    return np.concatenate(parts)


def without_each_unit(sample: Sample) -> FloatArray:
    """Return counts[units, n]: 0 for the sequences of one unit, 1 for the others."""
    units = unit_numbers(sample)
    return np.asarray(units != np.arange(n_units(sample))[:, None], dtype=np.float64)


def freedom(sample: Sample) -> float:
    """Return the degrees of freedom of the sample's units: their effective number less one.

    Units of unequal length count as (Σ n)² / Σ n² equal ones (Carter, Schnepel & Steigerwald 2017,
    Review of Economics and Statistics 99).
    """
    n = np.bincount(unit_numbers(sample)).astype(np.float64)
    return max(1.0, float(n.sum() ** 2 / np.sum(n**2)) - 1)


def student_t(sample: Sample) -> float:
    """Return the t by which an interval from the sample's units reaches from its standard error."""
    from scipy import stats  # takes half a second, which other commands need not wait

    return float(stats.t.ppf((1 + _COVERAGE) / 2, freedom(sample)))


def jackknife_error(left_out: FloatArray, value: float) -> float:
    """Return the standard error of value from its values without one unit each."""
    n = len(left_out)
    return float(np.sqrt((n - 1) / n * np.sum((left_out - value) ** 2)))


def estimate(statistic: Statistic[S], sample: S) -> Estimate:
    """Return the statistic with its 95 % interval, where one holds."""
    value = statistic.of(sample)
    if not statistic.has_interval(sample):
        return Estimate(value)
    if statistic.quantile is not None and statistic.values is not None:
        return quantile_estimate(statistic.values(sample), sample, statistic.quantile)
    left_out = distribution(statistic, sample, without_each_unit(sample))
    if statistic.percentage:
        error = jackknife_error(left_out / 100, value / 100)
        found = _share_interval(value / 100, error, int(sample.n_tokens.sum()), sample)
        return Estimate(value, 100 * found[0], 100 * found[1])
    if not statistic.logarithmic or min(value, left_out.min()) <= 0:
        reach = student_t(sample) * jackknife_error(left_out, value)
        low, high = value - reach, value + reach
        if statistic.logarithmic:
            low = min(value, max(0.0, low))
    else:
        reach = student_t(sample) * jackknife_error(np.log(left_out), float(np.log(value)))
        low, high = float(value * np.exp(-reach)), float(value * np.exp(reach))
    return Estimate(value, low, max(value, min(high, statistic.largest)))


def quantile_estimate(values: FloatArray, sample: Sample, q: float) -> Estimate:
    """Return quantile q of values[n] of the sample's sequences with Woodruff's interval."""
    value = float(np.quantile(values, q))
    if n_units(sample) < MIN_UNITS:
        return Estimate(value)
    reach = student_t(sample) * _share_error(values <= value, sample)
    low, high = np.quantile(values, np.clip((q - reach, q + reach), 0, 1))
    return Estimate(value, min(float(low), value), max(float(high), value))


def share_estimate(hits: npt.NDArray[np.float64], sample: Sample) -> Estimate:
    """Return the share of sequences that are hits (0, 0.5 for half, 1), with its interval.

    Hits may be any number from 0 to 1. Where all or none are hits, units count as observations:
    within one nothing can be said.
    """
    share = float(hits.mean())
    if n_units(sample) < MIN_UNITS:
        return Estimate(share)
    return Estimate(share, *_share_interval(share, _share_error(hits, sample), len(hits), sample))


def _share_interval(share: float, error: float, n: int, sample: Sample) -> tuple[float, float]:
    """Return the interval of a share of n observations, whose standard error is known.

    Korn & Graubard 1998: the observations count as n over their design effect, times the square of
    what t with n − 1 degrees of freedom is to the t of the units; no more than n. Without an error
    the design effect is unknown and the units count.
    """
    from scipy import stats

    effective = min(n, share * (1 - share) / error**2) if error > 0 else n_units(sample)
    effective *= (float(stats.t.ppf((1 + _COVERAGE) / 2, n - 1)) / student_t(sample)) ** 2
    x = share * effective
    tail = (1 - _COVERAGE) / 2
    low = float(stats.beta.ppf(tail, x, effective - x + 1)) if share > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, x + 1, effective - x)) if share < 1 else 1.0
    return min(low, share), max(high, share)


def _share_error(hits: npt.NDArray[np.float64] | npt.NDArray[np.bool_], sample: Sample) -> float:
    units = unit_numbers(sample)
    found, n = np.bincount(units, hits.astype(np.float64)), np.bincount(units)
    left_out = (found.sum() - found) / (n.sum() - n)
    return jackknife_error(left_out, float(hits.mean()))


def check_paired(a: Sample, b: Sample) -> None:
    """Raise ResultError unless both samples have the same sequences."""
    if not np.array_equal(a.n_tokens, b.n_tokens):
        raise ResultError(
            f"paired statistics need the same sequences; found {len(a.n_tokens)} and"
            f" {len(b.n_tokens)} with different token counts"
        )
