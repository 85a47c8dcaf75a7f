"""Statistics over per-sequence losses that say what a single mean hides.

Every statistic is a function of a sample and of `counts`: how often each sequence occurs. Counts of
one give the statistic itself; without a unit they give its jackknife value, drawn with replacement
its bootstrap value. A new statistic is one such function and one line in STATISTICS or DIVERGENCES.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.result import FIRST_TOKENS

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

OUTLIER_PPL = 100.0
MIN_UNITS = 8  # fewer sequences or articles do not allow an estimate of their spread
MIN_BEYOND = 5  # sequences that must lie beyond a quantile before it gets an interval
HEAVY_TAIL_INDEX = 2.0  # below it, PPL has no finite variance
_MAX_NLL = 700.0  # exp of it, and sums of many such, are still finite doubles


class Sample(Protocol):
    """Observations in sequences, which may fall into groups that are resampled whole."""

    @property
    def n_tokens(self) -> IntArray: ...
    @property
    def group(self) -> IntArray | None: ...


@dataclass(frozen=True, eq=False)
class SequenceLosses:
    """NLL sums (nats) and scored tokens of each sequence; group numbers its article, if known.

    Raises ResultError when empty, when lengths differ or a value is not finite and positive.
    """

    nll_sum: FloatArray
    n_tokens: IntArray
    group: IntArray | None = None

    def __post_init__(self) -> None:
        _check(self, ("nll_sum",))

    @property
    def mean_nll(self) -> FloatArray:
        """Mean NLL per scored token of each sequence, nats."""
        return self.nll_sum / self.n_tokens

    @property
    def ppl(self) -> FloatArray:
        """Sequence PPL; capped at exp(700)."""
        return np.asarray(np.exp(np.minimum(self.mean_nll, _MAX_NLL)))


@dataclass(frozen=True, eq=False)
class SequenceDivergences:
    """Sums per sequence of what parts a model from its reference: KLD in nats, Δp in [−1, 1].

    n_first and first_kld_sum are of the first tokens of the window, where these are known.
    """

    n_tokens: IntArray
    kld_sum: FloatArray
    n_same_top: IntArray
    delta_p_sum: FloatArray
    delta_p_squared_sum: FloatArray
    group: IntArray | None = None
    n_first: IntArray | None = None
    first_kld_sum: FloatArray | None = None

    def __post_init__(self) -> None:
        known = () if self.n_first is None else ("n_first", "first_kld_sum")
        _check(self, ("kld_sum", "n_same_top", "delta_p_sum", "delta_p_squared_sum", *known))

    @property
    def late_kld_sum(self) -> FloatArray:
        """KLD of the tokens after the first ones, nats; of all where the first are not known."""
        return self.kld_sum if self.first_kld_sum is None else self.kld_sum - self.first_kld_sum

    @property
    def n_late(self) -> IntArray:
        """How many tokens come after the first ones."""
        return self.n_tokens if self.n_first is None else self.n_tokens - self.n_first


def _check(sample: Sample, fields: tuple[str, ...]) -> None:
    n = sample.n_tokens.shape
    if len(n) != 1 or n[0] == 0 or sample.n_tokens.min() < 1:
        raise ResultError("sequence scores: expected at least one sequence of at least one token")
    group = () if sample.group is None else ("group",)
    for field in (*fields, *group):
        values = getattr(sample, field)
        if values.shape != n:
            raise ResultError(f"sequence scores: {field} has shape {values.shape}, expected {n}")
        if not np.isfinite(values).all():
            worst = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ResultError(f"sequence scores: {field} of sequence {worst} is not finite")


# --- one function per statistic; counts has shape [..., n], the result [...] ---


def corpus_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return exp(Σ NLL / Σ tokens): every token weighs the same."""
    mean = (counts @ losses.nll_sum) / (counts @ losses.n_tokens)
    return np.asarray(np.exp(np.minimum(mean, _MAX_NLL)))


def mean_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the arithmetic mean of sequence PPL: one wild sequence can own it."""
    return np.asarray((counts @ losses.ppl) / counts.sum(-1))


def geometric_mean_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return exp of the mean of the sequences' mean NLL: every sequence weighs the same."""
    mean = (counts @ losses.mean_nll) / counts.sum(-1)
    return np.asarray(np.exp(np.minimum(mean, _MAX_NLL)))


def median_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the median of sequence PPL."""
    return quantile(losses.ppl, counts, 0.5)


def p95_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the 95th percentile of sequence PPL."""
    return quantile(losses.ppl, counts, 0.95)


def p99_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the 99th percentile of sequence PPL."""
    return quantile(losses.ppl, counts, 0.99)


def max_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the largest sequence PPL."""
    return quantile(losses.ppl, counts, 1.0)


def mad_ppl(losses: SequenceLosses, counts: FloatArray) -> FloatArray:
    """Return the median absolute deviation of sequence PPL from its median (not rescaled)."""
    return quantile(np.abs(losses.ppl - median_ppl(losses, counts)[..., None]), counts, 0.5)


def mean_kld(sample: SequenceDivergences, counts: FloatArray) -> FloatArray:
    """Return the mean KLD per token, nats."""
    return np.asarray((counts @ sample.kld_sum) / (counts @ sample.n_tokens))


def late_kld(sample: SequenceDivergences, counts: FloatArray) -> FloatArray:
    """Return the mean KLD per token without the first tokens of every window, nats."""
    return np.asarray((counts @ sample.late_kld_sum) / (counts @ sample.n_late))


def same_top_p(sample: SequenceDivergences, counts: FloatArray) -> FloatArray:
    """Return the percentage of tokens with the same most probable token as the reference."""
    return np.asarray(100 * (counts @ sample.n_same_top) / (counts @ sample.n_tokens))


def mean_delta_p(sample: SequenceDivergences, counts: FloatArray) -> FloatArray:
    """Return the mean change of the target's probability, percentage points."""
    return np.asarray(100 * (counts @ sample.delta_p_sum) / (counts @ sample.n_tokens))


def rms_delta_p(sample: SequenceDivergences, counts: FloatArray) -> FloatArray:
    """Return the root mean square change of the target's probability, percentage points."""
    mean = (counts @ sample.delta_p_squared_sum) / (counts @ sample.n_tokens)
    return np.asarray(100 * np.sqrt(mean))


def quantile(values: FloatArray, counts: FloatArray, q: float) -> FloatArray:
    """Return quantile q of values[..., n], each repeated counts[..., n] times.

    Equals numpy.quantile (linear interpolation) of the repeated values, for whole counts.
    """
    order = np.argsort(values, axis=-1)
    values = np.take_along_axis(values, order, -1)
    shape = np.broadcast_shapes(values.shape, counts.shape)
    counts = np.take_along_axis(np.broadcast_to(counts, shape), np.broadcast_to(order, shape), -1)
    seen = counts.cumsum(-1)
    position = (seen[..., -1:] - 1) * q
    low = np.floor(position)
    high = np.ceil(position)
    below, above = (
        np.take_along_axis(
            np.broadcast_to(values, shape), (seen <= rank).sum(-1, keepdims=True), -1
        )
        for rank in (low, high)
    )
    return np.asarray((below + (position - low) * (above - below))[..., 0])


# --- the registries, and which statistics get an interval ---


def unit_numbers(sample: Sample) -> IntArray:
    """Return the number of each sequence's unit, from 0: its group where known, else itself."""
    if sample.group is None:
        return np.arange(len(sample.n_tokens))
    return np.unique(sample.group, return_inverse=True)[1].astype(np.int64)


def n_units(sample: Sample) -> int:
    """Return how many independent units there are: groups where known, else sequences."""
    return len(sample.n_tokens if sample.group is None else np.unique(sample.group))


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Statistic(Generic[S]):
    """A statistic: its name in tables and its function.

    terms: for a ratio or mean of sums, what each sequence adds to it. Two models that scored the
    same tokens have the same statistic where the terms' differences sum to 0.
    quantile, values: for a quantile, which one and of what.
    logarithmic: it is not negative and compared by ratios.
    percentage: it is a share of the tokens, in percent.
    largest: the largest value that is possible.
    needs_light_tail: it averages PPL itself, which has no finite variance under a heavy tail.
    needs: the field of the sample without which there is no value.
    """

    label: str
    function: Callable[[S, FloatArray], FloatArray]
    terms: Callable[[S], FloatArray] | None = None
    quantile: float | None = None
    values: Callable[[S], FloatArray] | None = None
    logarithmic: bool = True
    percentage: bool = False
    largest: float = math.inf
    needs_light_tail: bool = False
    needs: str | None = None

    def is_known(self, sample: S) -> bool:
        """Return whether the sample has what the statistic is computed from."""
        return self.needs is None or getattr(sample, self.needs) is not None

    def of(self, sample: S) -> float:
        """Return the statistic of the sample itself."""
        return float(self.function(sample, np.ones(len(sample.n_tokens))))

    def has_interval(self, sample: S) -> bool:
        """Return whether an interval holds: enough units, beyond a quantile too, a tame tail."""
        if self.needs_light_tail and isinstance(sample, SequenceLosses) and tail(sample).heavy:
            return False
        n = n_units(sample)
        beyond = n if self.quantile is None else round(n * (1 - self.quantile), 9)
        return n >= MIN_UNITS and beyond >= min(MIN_BEYOND, n / 2)


def _ppl(losses: SequenceLosses) -> FloatArray:
    return losses.ppl


def _deviations(losses: SequenceLosses) -> FloatArray:
    return np.abs(losses.ppl - np.median(losses.ppl))


STATISTICS: Mapping[str, Statistic[SequenceLosses]] = {
    "corpus_ppl": Statistic("corpus PPL", corpus_ppl, terms=lambda s: s.nll_sum),
    "median_ppl": Statistic("median PPL", median_ppl, quantile=0.5, values=_ppl),
    "mean_ppl": Statistic("mean PPL", mean_ppl, terms=_ppl, needs_light_tail=True),
    "geometric_mean_ppl": Statistic(
        "geometric mean PPL", geometric_mean_ppl, terms=lambda s: s.mean_nll
    ),
    "p95_ppl": Statistic("P95 PPL", p95_ppl, quantile=0.95, values=_ppl),
    "p99_ppl": Statistic("P99 PPL", p99_ppl, quantile=0.99, values=_ppl),
    "max_ppl": Statistic("maximum PPL", max_ppl, quantile=1.0, values=_ppl),
    "mad_ppl": Statistic("MAD of PPL", mad_ppl, quantile=0.5, values=_deviations),
}

DIVERGENCES: Mapping[str, Statistic[SequenceDivergences]] = {
    "mean_kld": Statistic("mean KLD", mean_kld, terms=lambda s: s.kld_sum),
    "late_kld": Statistic(
        f"KLD from token {FIRST_TOKENS} on",
        late_kld,
        terms=lambda s: s.late_kld_sum,
        needs="n_first",
    ),
    "same_top_p": Statistic(
        "same top p",
        same_top_p,
        terms=lambda s: s.n_same_top.astype(np.float64),
        logarithmic=False,
        percentage=True,
    ),
    "mean_delta_p": Statistic(
        "mean Δp", mean_delta_p, terms=lambda s: s.delta_p_sum, logarithmic=False
    ),
    "rms_delta_p": Statistic("RMS Δp", rms_delta_p, terms=lambda s: s.delta_p_squared_sum),
}


# --- tails ---


@dataclass(frozen=True)
class Tail:
    """How heavy the upper tail of sequence PPL is; index is NaN below 20 sequences."""

    index: float
    mean_over_median: float

    @property
    def heavy(self) -> bool:
        """Whether the tail alone parts mean and median: PPL without a finite variance."""
        return self.index < HEAVY_TAIL_INDEX

    @property
    def verdict(self) -> str:
        """Return heavy-tailed, light-tailed or (too few sequences) unknown."""
        if np.isnan(self.index):
            return "unknown"
        return "heavy-tailed" if self.heavy else "light-tailed"


def tail(losses: SequenceLosses) -> Tail:
    """Return Hill's tail index of sequence PPL over its top tenth, and mean over median.

    The index is α of P(PPL > x) ~ x^−α; 1/α is by how many nats the top tenth exceeds the largest
    of the rest, on average. Below 2 the variance is infinite, below 1 the mean itself: a mean of
    such PPL tells which sequences were drawn, not how good the model is. Log-normal PPL with a
    spread of 0.4 nats has α near 5 (Hill 1975, Annals of Statistics 3).
    """
    nll = np.sort(losses.mean_nll)
    ratio = STATISTICS["mean_ppl"].of(losses) / STATISTICS["median_ppl"].of(losses)
    if len(nll) < 20:
        return Tail(float("nan"), ratio)
    k = -(-len(nll) // 10)
    excess = float(np.mean(nll[-k:] - nll[-k - 1]))
    return Tail(1 / excess if excess > 0 else float("inf"), ratio)


def outliers(losses: SequenceLosses, threshold: float = OUTLIER_PPL) -> IntArray:
    """Return the positions of sequences with PPL above the threshold, worst first."""
    found = np.flatnonzero(losses.ppl > threshold)
    return found[np.argsort(-losses.ppl[found], kind="stable")]
