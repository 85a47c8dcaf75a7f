"""What one evaluation says: statistics with intervals, the tail, the distance to a reference."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.common_sequences import why_missing
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.intervals import Estimate, estimate
from ramgguf.evaluate.llama_statistics import LlamaStatistics
from ramgguf.evaluate.result import EvalResult, SequenceScore
from ramgguf.evaluate.significance import (
    PairedSequences,
    Ratio,
    delta_nll,
    paired_ratio,
    paired_sequences,
)
from ramgguf.evaluate.statistics import (
    DIVERGENCES,
    OUTLIER_PPL,
    STATISTICS,
    IntArray,
    SequenceDivergences,
    SequenceLosses,
    Tail,
    outliers,
    tail,
)
from ramgguf.evaluate.token_groups import first_sums
from ramgguf.gguf.identity import difference


@dataclass(frozen=True)
class KldQuantiles:
    """Quantiles of the KLD over all scored tokens, nats; no interval is claimed for them.

    worst_share is the share of all KLD that the worst thousandth of the tokens carries.
    """

    median: float
    p90: float
    p99: float
    p999: float
    maximum: float
    worst_share: float | None = None


@dataclass(frozen=True)
class FirstTokens:
    """The first tokens of all windows: mean KLD (nats), share of the tokens and of all KLD."""

    kld: float
    share_of_tokens: float
    share_of_kld: float


@dataclass(frozen=True, eq=False)
class AgainstReference:
    """How a model differs from the reference that scored the same tokens.

    delta_nll has a value per sequence, nats per token; ppl_ratio is corpus PPL over the
    reference's, with the p-value of no difference; sequences counts those on which it is better.
    first is of the first tokens of all windows, where they are known and were scored. llama has
    what llama-perplexity prints, where values per token were kept.
    """

    label: str
    reference_corpus_ppl: float
    divergences: Mapping[str, Estimate]
    quantiles: KldQuantiles | None
    delta_nll: tuple[float, ...]
    ppl_ratio: Ratio
    sequences: PairedSequences
    first: FirstTokens | None = None
    llama: LlamaStatistics | None = None


@dataclass(frozen=True, eq=False)
class Summary:
    """The statistics of one result. estimates has the names of STATISTICS; outliers are the
    sequences above outlier_ppl, worst first. In a comparison, result has the shared sequences.
    """

    label: str
    result: EvalResult
    estimates: Mapping[str, Estimate]
    tail: Tail
    outlier_ppl: float
    outliers: tuple[SequenceScore, ...]
    against: AgainstReference | None
    is_reference: bool = False


def summarize(
    result: EvalResult,
    *,
    label: str | None = None,
    outlier_ppl: float = OUTLIER_PPL,
    is_reference: bool = False,
) -> Summary:
    """Return the statistics of one result. Raises ResultError when no sequence was scored."""
    sample = losses(result)
    return Summary(
        label=label or result.model.label,
        result=result,
        estimates={name: estimate(s, sample) for name, s in STATISTICS.items()},
        tail=tail(sample),
        outlier_ppl=outlier_ppl,
        outliers=tuple(_chosen(result, None)[i] for i in outliers(sample, outlier_ppl)),
        against=_against_reference(result, sample),
        is_reference=is_reference,
    )


def _against_reference(result: EvalResult, sample: SequenceLosses) -> AgainstReference | None:
    reference, divergences = reference_losses(result), sequence_divergences(result)
    if result.reference is None or reference is None or divergences is None:
        return None
    corpus = STATISTICS["corpus_ppl"]
    return AgainstReference(
        label=result.reference.label,
        reference_corpus_ppl=corpus.of(reference),
        divergences={
            k: estimate(s, divergences) for k, s in DIVERGENCES.items() if s.is_known(divergences)
        },
        quantiles=_kld_quantiles(result),
        delta_nll=tuple(float(d) for d in delta_nll(sample, reference)),
        ppl_ratio=paired_ratio(corpus, sample, reference),
        sequences=paired_sequences(sample, reference),
        first=_first_tokens(divergences),
        llama=result.as_llama_perplexity(),
    )


def _first_tokens(sample: SequenceDivergences) -> FirstTokens | None:
    if sample.n_first is None or sample.first_kld_sum is None or not sample.n_first.any():
        return None
    n, kld = int(sample.n_first.sum()), float(sample.first_kld_sum.sum())
    whole = float(sample.kld_sum.sum())
    return FirstTokens(kld / n, n / int(sample.n_tokens.sum()), kld / whole if whole > 0 else 0.0)


def _kld_quantiles(result: EvalResult) -> KldQuantiles | None:
    if result.kld_quantiles is None:
        return None
    at = result.kld_quantiles.at
    return KldQuantiles(at(0.5), at(0.9), at(0.99), at(0.999), at(1.0), result.kld_worst_share)


def losses(result: EvalResult, only: Collection[int] | None = None) -> SequenceLosses:
    """Return the losses of the finished sequences, or of those whose index is in `only`."""
    chosen = _chosen(result, only)
    return SequenceLosses(
        nll_sum=np.array([s.nll_sum for s in chosen]),
        n_tokens=np.array([s.n_scored for s in chosen], dtype=np.int64),
        group=articles([s.title for s in chosen]),
    )


def reference_losses(result: EvalResult) -> SequenceLosses | None:
    """Return the reference's losses on the same sequences; None without a reference."""
    chosen = _chosen(result, None)
    sums = [s.reference_nll_sum for s in chosen if s.reference_nll_sum is not None]
    if len(sums) != len(chosen):
        return None
    n_tokens = np.array([s.n_scored for s in chosen], dtype=np.int64)
    return SequenceLosses(np.array(sums), n_tokens, articles([s.title for s in chosen]))


def sequence_divergences(
    result: EvalResult, only: Collection[int] | None = None
) -> SequenceDivergences | None:
    """Return the divergences of the finished sequences; None unless every one has them.

    A reference has none from itself: it would lead every ranking by KLD.
    """
    chosen = _chosen(result, only)
    if result.reference is not None and difference(result.reference, result.model) is None:
        return None
    rows = [
        (s.n_scored, s.kld_sum, s.n_same_top, s.delta_p_sum, s.delta_p_squared_sum) for s in chosen
    ]
    if any(value is None for row in rows for value in row):
        return None
    columns = np.array(rows, dtype=np.float64).T
    first = [first_sums(s) for s in chosen]
    known = [f for f, s in zip(first, chosen, strict=True) if f is not None and f[0] < s.n_scored]
    n_first = first_kld = None
    if len(known) == len(chosen):
        n_first = np.array([n for n, _ in known], dtype=np.int64)
        first_kld = np.array([kld for _, kld in known])
    return SequenceDivergences(
        n_tokens=columns[0].astype(np.int64),
        kld_sum=columns[1],
        n_same_top=columns[2].astype(np.int64),
        delta_p_sum=columns[3],
        delta_p_squared_sum=columns[4],
        group=articles([s.title for s in chosen]),
        n_first=n_first,
        first_kld_sum=first_kld,
    )


def _chosen(result: EvalResult, only: Collection[int] | None) -> tuple[SequenceScore, ...]:
    chosen = sorted(
        (s for s in result.sequences if only is None or s.index in only), key=lambda s: s.index
    )
    if not chosen:
        why = f" ({found})" if (found := why_missing(result)) else ""
        raise ResultError(f"{result.model.path}: no scored sequence to summarize{why}")
    return tuple(chosen)


def articles(titles: Sequence[str | None]) -> IntArray | None:
    """Return the article of each title as a number; None where the text names no articles."""
    if all(title is None for title in titles):
        return None
    numbers = {title: i for i, title in enumerate(dict.fromkeys(titles))}
    return np.array([numbers[title] for title in titles], dtype=np.int64)


def unique_labels(results: Sequence[EvalResult | EmbeddingResult]) -> tuple[str, ...]:
    """Return a label per result: the file's name, with as many folders as tell them apart."""
    parts = [r.model.path.replace("\\", "/").removesuffix(".gguf").split("/") for r in results]
    labels = [p[-1] for p in parts]
    for depth in range(2, max(map(len, parts), default=1) + 1):
        labels = [
            "/".join(p[-depth:]) if labels.count(label) > 1 else label
            for p, label in zip(parts, labels, strict=True)
        ]
    return tuple(
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    )
