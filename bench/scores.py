"""What benches say of a scored file: KLD, corpus and median PPL, with intervals over sequences."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.evaluate.result import EvalResult

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """A ratio of mean KLDs on the same sequences, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """Mean KLD in nats, corpus and median PPL, each with its 95 % interval (low, high)."""

    kld: float
    kld_interval: tuple[float, float]
    corpus_ppl: float
    corpus_ppl_interval: tuple[float, float]
    median_ppl: float
    median_ppl_interval: tuple[float, float]


def _drawn(n: int) -> NDArray[np.int64]:
    """Return the same resamples of n sequences for every file: differences are paired."""
    return np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))


def _klds(result: EvalResult) -> NDArray[np.float64]:
    return np.array([s.kld_sum or 0.0 for s in result.sequences])


def _counts(result: EvalResult) -> NDArray[np.float64]:
    return np.array([float(s.n_scored) for s in result.sequences])


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def kld_ratio(a: EvalResult, b: EvalResult) -> Ratio:
    """Return the mean KLD of a over that of b, resampled together."""
    first, second = _klds(a), _klds(b)
    drawn = _drawn(len(first))
    low, high = _interval(first[drawn].sum(axis=1) / second[drawn].sum(axis=1))
    return Ratio(float(first.sum() / second.sum()), low, high)


def scores(result: EvalResult) -> Scores:
    """Return a file's scores."""
    losses = np.array([s.nll_sum for s in result.sequences])
    counts, klds = _counts(result), _klds(result)
    drawn = _drawn(len(losses))
    totals = counts[drawn].sum(axis=1)
    sequence_ppl = np.exp(losses / counts)
    return Scores(
        kld=float(klds.sum() / counts.sum()),
        kld_interval=_interval(klds[drawn].sum(axis=1) / totals),
        corpus_ppl=float(np.exp(losses.sum() / counts.sum())),
        corpus_ppl_interval=_interval(np.exp(losses[drawn].sum(axis=1) / totals)),
        median_ppl=float(np.median(sequence_ppl)),
        median_ppl_interval=_interval(np.median(sequence_ppl[drawn], axis=1)),
    )
