"""What can be said about embedding models together, computed once for every output."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ramgguf.evaluate.embedding_result import EmbeddingResult, incomparable_embeddings
from ramgguf.evaluate.intervals import Estimate, estimate, share_estimate
from ramgguf.evaluate.significance import Ratio, paired_ratio
from ramgguf.evaluate.statistics import FloatArray, IntArray, Statistic, quantile
from ramgguf.evaluate.summary import articles, unique_labels


@dataclass(frozen=True, eq=False)
class TextDistances:
    """Per text: 1 − cosine to the original's embedding, 1 − Spearman's ρ, and so on.

    All are 0 for a copy of the original, so that ratios between models are ratios of losses.
    group numbers a text's article, if known.
    """

    cosine: FloatArray
    rank: FloatArray
    nearest: FloatArray
    neighbours: FloatArray
    group: IntArray | None = None

    @property
    def n_tokens(self) -> IntArray:
        """One observation a text: every text counts alike."""
        return np.ones(len(self.cosine), np.int64)

    @classmethod
    def of(cls, result: EmbeddingResult) -> "TextDistances":
        """Return the distances of a result's texts."""
        return cls(
            cosine=1 - np.array([t.cosine for t in result.texts]),
            rank=1 - np.array([t.spearman for t in result.texts]),
            nearest=np.array([float(not t.same_nearest) for t in result.texts]),
            neighbours=1 - np.array([t.same_neighbours for t in result.texts]),
            group=articles([t.title for t in result.texts]),
        )


def _mean(values: Callable[[TextDistances], FloatArray]) -> Statistic[TextDistances]:
    return Statistic(
        "mean",
        lambda s, counts: np.asarray(counts @ values(s) / counts.sum(-1)),
        terms=values,
        largest=2,  # 1 − cosine, 1 − ρ
    )


def _quantile(q: float) -> Statistic[TextDistances]:
    return Statistic(
        f"P{100 * q:g}",
        lambda s, counts: quantile(s.cosine, counts, q),
        quantile=q,
        values=lambda s: s.cosine,
    )


DISTANCES: Mapping[str, Statistic[TextDistances]] = {
    "mean_cosine": _mean(lambda s: s.cosine),
    "median_cosine": _quantile(0.5),
    "p5_cosine": _quantile(0.95),  # of the distance
    "min_cosine": _quantile(1.0),
    "mean_spearman": _mean(lambda s: s.rank),
}


@dataclass(frozen=True, eq=False)
class EmbeddingSummary:
    """One model's estimates by name: those of DISTANCES, as 1 − the distance, and two shares:
    same_nearest and same_neighbours.
    """

    label: str
    result: EmbeddingResult
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class EmbeddingPair:
    """1 − cosine and 1 − Spearman's ρ of model a over those of model b, text by text."""

    a: str
    b: str
    cosine: Ratio
    rank: Ratio


@dataclass(frozen=True, eq=False)
class EmbeddingReport:
    """Summaries, the nearest to the original first, and pairs of neighbours in that order.

    refusal says why results are not compared with each other.
    """

    summaries: tuple[EmbeddingSummary, ...]
    pairs: tuple[EmbeddingPair, ...]
    refusal: str | None = None


def embedding_report(results: Sequence[EmbeddingResult]) -> EmbeddingReport:
    """Return what the results say, on their own and about each other."""
    summaries = tuple(
        _summary(label, result)
        for label, result in zip(unique_labels(results), results, strict=True)
    )
    reasons = [r for other in results[1:] for r in incomparable_embeddings(results[0], other)]
    if reasons:
        return EmbeddingReport(summaries, (), "; ".join(reasons))
    ordered = tuple(
        sorted(summaries, key=lambda s: (-s.estimates["mean_cosine"].value, s.result.model.n_bytes))
    )
    pairs = tuple(_pair(a, b) for a, b in itertools.pairwise(ordered))
    return EmbeddingReport(ordered, pairs)


def _summary(label: str, result: EmbeddingResult) -> EmbeddingSummary:
    sample = TextDistances.of(result)
    found = {name: _from_one(estimate(s, sample)) for name, s in DISTANCES.items()}
    found["same_nearest"] = share_estimate(1 - sample.nearest, sample)
    found["same_neighbours"] = share_estimate(1 - sample.neighbours, sample)
    return EmbeddingSummary(label, result, found)


def _from_one(distance: Estimate) -> Estimate:
    """Return 1 − a distance, with its interval."""
    if distance.low is None or distance.high is None:
        return Estimate(1 - distance.value)
    return Estimate(1 - distance.value, 1 - distance.high, 1 - distance.low)


def _pair(a: EmbeddingSummary, b: EmbeddingSummary) -> EmbeddingPair:
    x, y = TextDistances.of(a.result), TextDistances.of(b.result)
    return EmbeddingPair(
        a.label,
        b.label,
        cosine=paired_ratio(DISTANCES["mean_cosine"], x, y),
        rank=paired_ratio(DISTANCES["mean_spearman"], x, y),
    )
