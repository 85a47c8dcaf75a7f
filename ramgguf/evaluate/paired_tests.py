"""Paired tests of all models of a comparison, and which sequences decide between them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ramgguf.evaluate.common_sequences import is_reference
from ramgguf.evaluate.influence import influential_sequences
from ramgguf.evaluate.intervals import CountArray, Estimate, distribution, estimate
from ramgguf.evaluate.leaderboard import (
    CRITERIA,
    SIGNIFICANCE,
    Disagreement,
    InfluentialSequence,
    Pair,
    Ranking,
    Reversal,
    Row,
    Tie,
    ranking,
)
from ramgguf.evaluate.result import EvalResult, n_files
from ramgguf.evaluate.significance import (
    PairedSequences,
    Ratio,
    holm,
    paired_ratio,
    paired_sequences,
)
from ramgguf.evaluate.statistics import (
    DIVERGENCES,
    STATISTICS,
    FloatArray,
    SequenceDivergences,
    SequenceLosses,
    outliers,
)
from ramgguf.evaluate.summary import losses, sequence_divergences, unique_labels

Labels = tuple[str, str]


class PairedTests:
    """Results on one set of sequences: their values, ratios, and what decides between them."""

    def __init__(
        self, results: Sequence[EvalResult], rng: np.random.Generator, n_resamples: int
    ) -> None:
        self.labels = unique_labels(results)
        self._results = dict(zip(self.labels, results, strict=True))
        self._losses = {label: losses(r) for label, r in self._results.items()}
        self._divergences = self._comparable_divergences()
        self._n = len(results[0].sequences)
        self._rng, self._n_resamples = rng, n_resamples
        self.pairs = self._pairs()

    def _comparable_divergences(self) -> Mapping[str, SequenceDivergences]:
        if self._n_references > 1:
            return {}
        found = {label: sequence_divergences(r) for label, r in self._results.items()}
        return {label: d for label, d in found.items() if d is not None}

    @property
    def _n_references(self) -> int:
        return n_files(r.reference for r in self._results.values() if r.reference is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what limits the comparison, in sentences."""
        if self._n_references < 2:
            return ()
        return (f"KLD is not ranked: the results have {self._n_references} different references",)

    def rows(self, outlier_ppl: float) -> list[Row]:
        """Return a row per result, with intervals."""
        everyone = tuple(self._results.values())
        return [
            Row(
                label=label,
                n_bytes=r.model.n_bytes,
                estimates={
                    c: self._estimate(c, label) for c in CRITERIA if label in self._samples(c)
                },
                n_outliers=len(outliers(self._losses[label], outlier_ppl)),
                is_reference=is_reference(r, everyone),
            )
            for label, r in self._results.items()
        ]

    def disagreement(
        self, first: Ranking, second: Ranking, reversed_pairs: Sequence[Labels]
    ) -> Disagreement:
        """Return the disagreement with its significance, its causes, and what is left of it."""
        x, y = first.criterion, second.criterion
        reversals = tuple(self._reversal(x, y, pair) for pair in reversed_pairs)
        # Each reversed pair has its own influential sequences; all of them are removed together.
        removed = sorted({i for r in reversals for i in r.influential})
        if not removed:
            return Disagreement(first, second, reversals)
        kept = np.ones((1, self._n))
        kept[0, removed] = 0
        without = (self._rerank(first, kept), self._rerank(second, kept))
        named = tuple(self._influential(i, reversals) for i in removed)
        return Disagreement(first, second, reversals, named, without)

    def ties(self, rankings: Sequence[Ranking]) -> tuple[Tie, ...]:
        """Return the neighbours in a ranking that its criterion does not tell apart."""
        return tuple(
            Tie(r.criterion, a, b, found)
            for r in rankings
            for a, b in itertools.pairwise(r.order)
            if (found := self._pair(a, b).ratios[r.criterion]).p is not None
            and found.p >= SIGNIFICANCE
        )

    def _samples(self, criterion: str) -> Mapping[str, SequenceLosses | SequenceDivergences]:
        return self._divergences if criterion in DIVERGENCES else self._losses

    def _values(self, criterion: str, label: str, counts: CountArray) -> FloatArray:
        """Return the criterion under each row of counts[..., n]."""
        if criterion in DIVERGENCES:
            return distribution(DIVERGENCES[criterion], self._divergences[label], counts)
        return distribution(STATISTICS[criterion], self._losses[label], counts)

    def _estimate(self, criterion: str, label: str) -> Estimate:
        if criterion in DIVERGENCES:
            return estimate(DIVERGENCES[criterion], self._divergences[label])
        return estimate(STATISTICS[criterion], self._losses[label])

    def _rerank(self, old: Ranking, counts: FloatArray) -> Ranking:
        values = {a: float(self._values(old.criterion, a, counts)[0]) for a in old.order}
        return ranking(old.criterion, values)

    # --- pairs ---

    def _pairs(self) -> tuple[Pair, ...]:
        labels = list(itertools.combinations(self.labels, 2))
        raw = [Pair(a, b, self._ratios(a, b), self._paired(a, b)) for a, b in labels]
        signs = _corrected([p.sequences.p_sign for p in raw])
        ranks = _corrected([p.sequences.p_wilcoxon for p in raw])
        ratios = [dict(p.ratios) for p in raw]
        for c in CRITERIA:
            known = [r for r in ratios if c in r and r[c].p is not None]
            for r, p in zip(known, _corrected([r[c].p or 0.0 for r in known]), strict=True):
                r[c] = replace(r[c], p=p)
        return tuple(
            Pair(p.a, p.b, r, replace(p.sequences, p_sign=sign, p_wilcoxon=rank))
            for p, r, sign, rank in zip(raw, ratios, signs, ranks, strict=True)
        )

    def _paired(self, a: str, b: str) -> PairedSequences:
        return paired_sequences(self._losses[a], self._losses[b])

    def _ratios(self, a: str, b: str) -> dict[str, Ratio]:
        found = {
            c: paired_ratio(
                STATISTICS[c], self._losses[a], self._losses[b], self._rng, self._n_resamples
            )
            for c in CRITERIA
            if c in STATISTICS
        }
        if a in self._divergences and b in self._divergences:
            kld = DIVERGENCES["mean_kld"]
            found["mean_kld"] = paired_ratio(kld, self._divergences[a], self._divergences[b])
        return found

    def _pair(self, a: str, b: str) -> Pair:
        return next(p for p in self.pairs if {p.a, p.b} == {a, b}).of(a)

    # --- causes ---

    def _reversal(self, x: str, y: str, labels: Labels) -> Reversal:
        a, b = labels
        pair = self._pair(a, b)

        def difference(criterion: str, counts: FloatArray) -> FloatArray:
            return self._values(criterion, a, counts) - self._values(criterion, b, counts)

        return Reversal(
            better=a,
            worse=b,
            ratio_first=pair.ratios[x],
            ratio_second=pair.ratios[y],
            sequences=pair.sequences,
            influential=influential_sequences(x, y, self._n, difference),
        )

    def _influential(self, i: int, reversals: Sequence[Reversal]) -> InfluentialSequence:
        """Return the sequence with the pair, among those that it decides, that it parts most."""
        found = {
            label: sorted(r.sequences, key=lambda s: s.index)[i]
            for label, r in self._results.items()
        }
        decided = [(r.better, r.worse) for r in reversals if i in r.influential]
        pair = max(decided, key=lambda p: abs(found[p[0]].mean_nll - found[p[1]].mean_nll))
        ppl = {label: s.ppl for label, s in found.items()}
        return InfluentialSequence(found[pair[0]], ppl, pair)


def _corrected(p: Sequence[float]) -> list[float]:
    return [float(x) for x in holm(np.array(p, dtype=np.float64))] if p else []
