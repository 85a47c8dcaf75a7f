"""Paired tests of two models on the same sequences; units (articles) are exchanged whole.

No p-value is below 2^(1 − units), the smallest that swapping the two models within units can give.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ramgguf.evaluate.intervals import (
    Estimate,
    check_paired,
    distribution,
    freedom,
    jackknife_error,
    quantile_estimate,
    resample,
    share_estimate,
    student_t,
    without_each_unit,
)
from ramgguf.evaluate.statistics import (
    FloatArray,
    Sample,
    SequenceLosses,
    Statistic,
    n_units,
    unit_numbers,
)

_MAX_EXACT_UNITS = 12  # up to so many, every assignment of signs is tried: 4,096
_SEED = 42
N_RESAMPLES = 2000  # for the standard error of a ratio of quantiles: within 2 %

S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Ratio(Estimate):
    """A statistic of one model over that of another; p is two-sided, of no difference."""

    p: float | None = None

    def inverse(self) -> "Ratio":
        """Return the other model's statistic over this one's."""
        low = None if self.high is None else _over(self.high)
        high = None if self.low is None else _over(self.low)
        return Ratio(_over(self.value), low, high, self.p)


@dataclass(frozen=True)
class PairedSequences:
    """How two models, a and b, differ sequence by sequence.

    share is that of sequences on which a is better (an equal one counts half), median_delta the
    median of NLL_a − NLL_b, nats per token. p_sign is of the share being one half, p_wilcoxon of
    Wilcoxon's signed-rank test on the units' mean ΔNLL.
    """

    n: int
    n_better: int
    n_worse: int
    share: Estimate
    median_delta: Estimate
    p_sign: float
    p_wilcoxon: float

    def inverse(self) -> "PairedSequences":
        """Return how b differs from a."""
        return replace(
            self,
            n_better=self.n_worse,
            n_worse=self.n_better,
            share=_map(self.share, lambda x: 1 - x),
            median_delta=_map(self.median_delta, lambda x: -x),
        )


def paired_ratio(
    statistic: Statistic[S],
    a: S,
    b: S,
    rng: np.random.Generator | None = None,
    n_resamples: int = N_RESAMPLES,
) -> Ratio:
    """Return statistic(a) / statistic(b) of two models on the same sequences.

    Only a statistic that is positive has a ratio. Raises ResultError when the sequences differ.
    """
    check_paired(a, b)
    x, y = statistic.of(a), statistic.of(b)
    value = x / y if y > 0 else 1.0 if x == y else float("inf")
    if not (statistic.has_interval(a) and statistic.has_interval(b) and x > 0 and y > 0):
        return Ratio(value)
    log, units = float(np.log(value)), n_units(a)
    if statistic.quantile is None:
        error = jackknife_error(_log_ratio(statistic, a, b, without_each_unit(a)), log)
    else:
        counts = resample(a, rng or np.random.default_rng(_SEED), n_resamples)
        drawn = _log_ratio(statistic, a, b, counts.astype(np.float64))
        error = float(np.std(drawn, ddof=1) * np.sqrt(units / (units - 1)))
    reach = student_t(a) * error
    low, high = float(np.exp(log - reach)), float(np.exp(log + reach))
    if statistic.terms is not None and units <= _MAX_EXACT_UNITS:
        delta = statistic.terms(a) - statistic.terms(b)
        p = sign_flip_p(np.bincount(unit_numbers(a), delta).astype(np.float64))
    else:
        p = _t_test_p(log, error, freedom(a), units)
    return Ratio(value, low, high, p)


def paired_sequences(a: SequenceLosses, b: SequenceLosses) -> PairedSequences:
    """Return how often and by how much a is better than b. Raises ResultError as paired_ratio."""
    delta = delta_nll(a, b)
    units = unit_numbers(a)
    signs = np.sign(delta)
    return PairedSequences(
        n=len(delta),
        n_better=int(np.count_nonzero(delta < 0)),
        n_worse=int(np.count_nonzero(delta > 0)),
        share=share_estimate((1 - signs) / 2, a),
        median_delta=quantile_estimate(delta, a, 0.5),
        p_sign=sign_p(np.bincount(units, signs).astype(np.float64)),
        p_wilcoxon=wilcoxon_p(a, b),
    )


def delta_nll(a: SequenceLosses, b: SequenceLosses) -> FloatArray:
    """Return the mean NLL of a minus that of b per sequence, nats per token."""
    check_paired(a, b)
    return a.mean_nll - b.mean_nll


def wilcoxon_p(a: SequenceLosses, b: SequenceLosses) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test on the units' mean ΔNLL.

    Units, not sequences, are ranked: sequences of one article go the same way together.
    """
    from scipy import stats  # takes half a second, which other commands need not wait

    check_paired(a, b)
    units = unit_numbers(a)
    delta = np.bincount(units, a.nll_sum - b.nll_sum) / np.bincount(units, a.n_tokens)
    return _at_least(float(stats.wilcoxon(delta).pvalue), len(delta)) if delta.any() else 1.0


def sign_flip_p(totals: FloatArray) -> float:
    """Return the exact two-sided p-value of Σ totals = 0 under flips of the units' signs."""
    from scipy import stats

    if not totals.any():
        return 1.0
    if len(totals) == 1:
        return 1.0
    found = stats.permutation_test(
        (totals,),
        lambda x, axis: np.sum(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    return float(found.pvalue)


def sign_p(totals: FloatArray) -> float:
    """Return the exact two-sided p-value of the sign test; totals[u] is a unit's sum of signs.

    Flips of whole units are exchangeable where neither model is better (Larocque 2005, Journal of
    Statistical Planning and Inference 129); with one sequence a unit it is the binomial test.
    """
    steps = np.abs(totals[totals != 0]).astype(np.int64)
    if not len(steps):
        return 1.0
    chances = np.ones(1)  # of Σ ±steps, from −Σ steps to Σ steps in steps of 1
    for step in steps:
        longer = np.zeros(len(chances) + 2 * step)
        longer[: len(chances)] += chances / 2
        longer[2 * step :] += chances / 2
        chances = longer
    reached = np.abs(np.arange(len(chances)) - steps.sum()) >= abs(int(totals.sum()))
    return min(1.0, float(chances[reached].sum()))


def holm(p: FloatArray) -> FloatArray:
    """Return the p-values adjusted for their number (Holm 1979); compare them with 0.05."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _log_ratio(statistic: Statistic[S], a: S, b: S, counts: FloatArray) -> FloatArray:
    drawn = distribution(statistic, a, counts), distribution(statistic, b, counts)
    tiny = np.finfo(np.float64).tiny
    return np.asarray(np.log(np.maximum(drawn[0], tiny)) - np.log(np.maximum(drawn[1], tiny)))


def _t_test_p(value: float, error: float, df: float, units: int) -> float:
    from scipy import stats

    if value == 0:
        return 1.0
    p = 2 * float(stats.t.sf(abs(value) / error, df)) if error > 0 else 0.0
    return _at_least(p, units)


def _at_least(p: float, units: int) -> float:
    """Return p, or the smallest that this many units support."""
    return min(1.0, max(p, 2.0 ** (1 - min(units, 1000))))


def _over(x: float) -> float:
    return 1 / x if x else float("inf")


def _map(found: Estimate, function: Callable[[float], float]) -> Estimate:
    low, high = found.low, found.high
    if low is None or high is None:
        return Estimate(function(found.value))
    return Estimate(function(found.value), function(high), function(low))
