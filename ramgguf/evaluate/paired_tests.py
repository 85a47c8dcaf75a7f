"""Per-sequence evidence behind a leaderboard: paired differences, and which sequences decide."""

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from ramgguf.evaluate.bootstrap import (
    CountArray,
    Difference,
    Estimate,
    difference,
    distribution,
    estimate,
    holm,
    resample,
    wilcoxon_p,
)
from ramgguf.evaluate.leaderboard import (
    CRITERIA,
    SIGNIFICANCE,
    Culprit,
    Disagreement,
    Ranking,
    Reversal,
    Row,
    Tie,
)
from ramgguf.evaluate.result import EvalResult, n_files
from ramgguf.evaluate.statistics import (
    DIVERGENCES,
    STATISTICS,
    FloatArray,
    SequenceDivergences,
    SequenceLosses,
    outliers,
)
from ramgguf.evaluate.summary import losses, sequence_divergences, unique_labels

_MAX_CULPRITS = 0.1  # of the sequences; more of them are the text, not an exception
_LIKE_THE_WORST = 0.25  # a sequence with this much of the worst one's influence is named with it

Pair = tuple[str, str]


class PairedTests:
    """Results on the sequences they share, resampled together."""

    def __init__(
        self,
        results: Sequence[EvalResult],
        shared: Sequence[int],
        rng: np.random.Generator,
        n_resamples: int,
    ) -> None:
        self.labels = unique_labels(results)
        self._results = tuple(results)
        self._shared = frozenset(shared)
        self._losses = {
            label: losses(r, self._shared) for label, r in zip(self.labels, results, strict=True)
        }
        self._counts = resample(self._losses[self.labels[0]], rng, n_resamples)
        self._drawn: dict[tuple[str, str], FloatArray] = {}
        self._tests: dict[str, Mapping[Pair, Difference]] = {}

    @cached_property
    def _divergences(self) -> Mapping[str, SequenceDivergences]:
        if self._n_references > 1:
            return {}
        found = {
            label: sequence_divergences(r, self._shared)
            for label, r in zip(self.labels, self._results, strict=True)
        }
        return {label: d for label, d in found.items() if d is not None}

    @property
    def _n_references(self) -> int:
        return n_files(r.reference for r in self._results if r.reference is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what limits the comparison, in sentences."""
        if self._n_references < 2:
            return ()
        return (f"KLD is not ranked: the results have {self._n_references} different references",)

    def rows(self, outlier_ppl: float) -> list[Row]:
        """Return a row per result, with intervals."""
        return [
            Row(
                label=label,
                n_bytes=r.model.n_bytes,
                estimates={
                    c: self._estimate(c, label) for c in CRITERIA if label in self._samples(c)
                },
                n_outliers=len(outliers(self._losses[label], outlier_ppl)),
            )
            for label, r in zip(self.labels, self._results, strict=True)
        ]

    def disagreement(self, first: Ranking, second: Ranking, pairs: Sequence[Pair]) -> Disagreement:
        """Return the disagreement with its significance, its culprits, and what is left of it."""
        x, y = first.criterion, second.criterion
        reversals = tuple(
            Reversal(
                better=a,
                worse=b,
                difference_first=self._test(x)[a, b],
                difference_second=self._test(y)[a, b],
                wilcoxon_p=wilcoxon_p(self._losses[a], self._losses[b]),
            )
            for a, b in pairs
        )
        # every pair has its own culprits; those that few pairs share still belong to the story
        removed = sorted(set().union(*(self._culprits(x, y, pair) for pair in pairs)))
        if not removed:
            return Disagreement(first, second, reversals)
        kept = np.ones((1, self._n))
        kept[0, removed] = 0
        without = (self._rerank(first, kept), self._rerank(second, kept))
        culprits = tuple(self._culprit(i) for i in removed)
        return Disagreement(first, second, reversals, culprits, without)

    def ties(self, rankings: Sequence[Ranking]) -> tuple[Tie, ...]:
        """Return the neighbours in a ranking that its criterion does not tell apart."""
        return tuple(
            Tie(ranking.criterion, a, b, found)
            for ranking in rankings
            for a, b in itertools.pairwise(ranking.order)
            if (found := self._test(ranking.criterion)[a, b]).p is not None
            and found.p >= SIGNIFICANCE
        )

    # --- values ---

    @property
    def _n(self) -> int:
        return len(self._shared)

    def _samples(self, criterion: str) -> Mapping[str, SequenceLosses | SequenceDivergences]:
        return self._divergences if criterion in DIVERGENCES else self._losses

    def _values(self, criterion: str, label: str, counts: CountArray) -> FloatArray:
        """Return the criterion under each row of counts[..., n]."""
        if criterion in DIVERGENCES:
            return distribution(DIVERGENCES[criterion], self._divergences[label], counts)
        return distribution(STATISTICS[criterion], self._losses[label], counts)

    def _estimate(self, criterion: str, label: str) -> Estimate:
        if criterion in DIVERGENCES:
            return estimate(DIVERGENCES[criterion], self._divergences[label], self._counts)
        return estimate(STATISTICS[criterion], self._losses[label], self._counts)

    def _difference(self, criterion: str, pair: Pair, counts: CountArray) -> FloatArray:
        a, b = pair
        return self._values(criterion, a, counts) - self._values(criterion, b, counts)

    def _rerank(self, ranking: Ranking, counts: FloatArray) -> Ranking:
        values = {a: float(self._values(ranking.criterion, a, counts)[0]) for a in ranking.order}
        return Ranking(ranking.criterion, tuple(sorted(ranking.order, key=values.__getitem__)))

    # --- significance ---

    def _test(self, criterion: str) -> Mapping[Pair, Difference]:
        """Return the differences of all pairs of models, p corrected for their number."""
        if criterion not in self._tests:
            labels = tuple(self._samples(criterion))
            raw = {p: self._raw(criterion, p) for p in itertools.permutations(labels, 2)}
            once = list(itertools.combinations(labels, 2))
            known = [p for p in once if raw[p].p is not None]
            corrected = holm(np.array([raw[p].p for p in known], dtype=np.float64))
            p_of = {frozenset(p): float(c) for p, c in zip(known, corrected, strict=True)}
            self._tests[criterion] = {
                pair: Difference(d.value, d.low, d.high, p_of.get(frozenset(pair)))
                for pair, d in raw.items()
            }
        return self._tests[criterion]

    def _raw(self, criterion: str, pair: Pair) -> Difference:
        ones = np.ones((1, self._n))
        value = float(self._difference(criterion, pair, ones)[0])
        if not all(self._has_interval(criterion, label) for label in pair):
            return Difference(value)
        a, b = (self._resampled(criterion, label) for label in pair)
        return difference(value, a - b)

    def _has_interval(self, criterion: str, label: str) -> bool:
        if criterion in DIVERGENCES:
            return DIVERGENCES[criterion].has_interval(self._divergences[label])
        return STATISTICS[criterion].has_interval(self._losses[label])

    def _resampled(self, criterion: str, label: str) -> FloatArray:
        key = (criterion, label)
        if key not in self._drawn:
            self._drawn[key] = self._values(criterion, label, self._counts)
        return self._drawn[key]

    # --- causes ---

    def _culprits(self, x: str, y: str, pair: Pair) -> set[int]:
        """Return positions of the fewest sequences without which x and y agree about the pair.

        Empty when a tenth of the sequences is not enough. Where each criterion has such sequences,
        those that stand out more from the others are the cause. Quantiles are not searched:
        removing a sequence moves them wherever it lies.
        """
        found = [
            self._pullers(c, x, y, pair)
            for c in (x, y)
            if c in DIVERGENCES or STATISTICS[c].quantile is None
        ]
        return max(found, default=(0.0, set[int]()), key=lambda f: f[0])[1]

    def _pullers(self, criterion: str, x: str, y: str, pair: Pair) -> tuple[float, set[int]]:
        """Return the sequences that pull the criterion its way, and how far they stand out."""
        n_most = max(1, int(_MAX_CULPRITS * self._n))
        if n_most >= self._n:
            return 0.0, set()
        whole = float(self._difference(criterion, pair, np.ones((1, self._n)))[0])
        influence = whole - self._difference(criterion, pair, 1 - np.eye(self._n))
        influence = influence * np.sign(whole)
        order = np.argsort(-influence, kind="stable")
        kept = np.ones((n_most, self._n))
        for k in range(n_most):
            kept[k, order[: k + 1]] = 0
        agree = self._difference(x, pair, kept) * self._difference(y, pair, kept) > 0
        if not agree.any():
            return 0.0, set()
        fewest = int(np.argmax(agree)) + 1
        n_alike = int(np.count_nonzero(influence >= _LIKE_THE_WORST * influence[order[0]]))
        if fewest < n_alike <= n_most and agree[n_alike - 1]:
            fewest = n_alike
        typical = float(np.median(np.abs(influence))) or np.finfo(np.float64).tiny
        return influence[order[0]] / typical, {int(i) for i in order[:fewest]}

    def _culprit(self, position: int) -> Culprit:
        index = sorted(self._shared)[position]
        found = {
            label: next(s for s in r.sequences if s.index == index)
            for label, r in zip(self.labels, self._results, strict=True)
        }
        first = found[self.labels[0]]
        return Culprit(first, {label: s.ppl for label, s in found.items()})
