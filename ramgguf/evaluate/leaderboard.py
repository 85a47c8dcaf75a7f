"""What a comparison found: rows, rankings by several criteria, and where these disagree."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ramgguf.core.drawing import Drawn
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.result import SequenceScore
from ramgguf.evaluate.significance import PairedSequences, Ratio
from ramgguf.evaluate.statistics import DIVERGENCES, STATISTICS

CRITERIA = ("corpus_ppl", "mean_ppl", "median_ppl", "mean_kld")  # all: the lower the better
LABELS = {name: s.label for name, s in STATISTICS.items()} | {
    name: s.label for name, s in DIVERGENCES.items()
}
SIGNIFICANCE = 0.05


class Verdict(StrEnum):
    """Whether two rankings really disagree about two models.

    FEW: the sequences prefer one model (sign test), and a tenth of them or fewer outweigh the rest.
    UNRESOLVED: the text is too short to tell; that is no proof that nothing differs.
    """

    SIGNIFICANT = "significant"
    FEW = "few sequences"
    UNRESOLVED = "unresolved"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Aggregate:
    """Published figures of one model, without per-sequence losses; None where not published."""

    label: str
    n_bytes: int | None = None
    corpus_ppl: float | None = None
    mean_ppl: float | None = None
    median_ppl: float | None = None
    mean_kld: float | None = None
    n_outliers: int | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One model of the leaderboard; estimates has the criteria that are known of it."""

    label: str
    n_bytes: int | None
    estimates: Mapping[str, Estimate]
    n_outliers: int | None
    is_reference: bool = False


@dataclass(frozen=True)
class Ranking:
    """Labels by a criterion, best first; equal[i]: order[i] and order[i + 1] have one value."""

    criterion: str
    order: tuple[str, ...]
    equal: tuple[bool, ...] = ()

    def only(self, labels: frozenset[str]) -> "Ranking":
        """Return the ranking of these models alone."""
        kept = [i for i, label in enumerate(self.order) if label in labels]
        equal = tuple(
            all(self.equal[i:j]) and bool(self.equal) for i, j in itertools.pairwise(kept)
        )
        return Ranking(self.criterion, tuple(self.order[i] for i in kept), equal)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models, a and b, on the same sequences; ratios are of a over b, by criterion.

    p-values are Holm-corrected over all pairs of models.
    """

    a: str
    b: str
    ratios: Mapping[str, Ratio]
    sequences: PairedSequences

    def of(self, a: str) -> "Pair":
        """Return the pair with the model of this label first."""
        if a == self.a:
            return self
        inverse = {c: r.inverse() for c, r in self.ratios.items()}
        return Pair(self.b, self.a, inverse, self.sequences.inverse())


@dataclass(frozen=True, eq=False)
class InfluentialSequence:
    """A sequence that outweighs others: its PPL under each model, and the pair it decides."""

    sequence: SequenceScore
    ppl: Mapping[str, float]
    pair: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Reversal:
    """Two models that two criteria rank in opposite ways: `first` prefers better, `second` worse.

    The ratios are better over worse in each criterion; they and sequences are None where only
    aggregates are known. influential holds the sequences without which the criteria agree.
    """

    better: str
    worse: str
    ratio_first: Ratio | None = None
    ratio_second: Ratio | None = None
    sequences: PairedSequences | None = None
    influential: tuple[int, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Return whether each criterion tells the models apart, or few sequences outweigh many."""
        if self.sequences is None:
            return Verdict.UNKNOWN
        if self.influential and self.sequences.p_sign < SIGNIFICANCE:
            return Verdict.FEW
        found = (self.ratio_first, self.ratio_second)
        if any(r is None or r.p is None for r in found):
            return Verdict.UNKNOWN
        both = all(r is not None and r.p is not None and r.p < SIGNIFICANCE for r in found)
        return Verdict.SIGNIFICANT if both else Verdict.UNRESOLVED


@dataclass(frozen=True, eq=False)
class Disagreement:
    """Where two rankings part. Without the influential sequences they become `without`.

    influential is empty when only aggregates are known, or when no tenth of the sequences is the
    cause. full_inversion: one ranking is the other backwards.
    """

    first: Ranking
    second: Ranking
    reversals: tuple[Reversal, ...]
    influential: tuple[InfluentialSequence, ...] = ()
    without: tuple[Ranking, Ranking] | None = None

    @property
    def full_inversion(self) -> bool:
        tied = any((*self.first.equal, *self.second.equal))
        return (
            not tied and len(self.first.order) > 1 and self.first.order == self.second.order[::-1]
        )


@dataclass(frozen=True)
class Tie:
    """Two models that follow each other in a ranking whose criterion does not tell them apart.

    ratio is better over worse, its p Holm-corrected over all pairs of models.
    """

    criterion: str
    better: str
    worse: str
    ratio: Ratio


@dataclass(frozen=True)
class Gap:
    """How far corpus and median PPL part, for the model where they part most (corpus − median)."""

    label: str
    corpus_ppl: float
    median_ppl: float

    @property
    def value(self) -> float:
        return self.corpus_ppl - self.median_ppl


@dataclass(frozen=True, eq=False)
class Leaderboard(Drawn):
    """Rows (the reference first, then by KLD or size), a ranking per criterion, where they part.

    pairs: every two models; empty where only aggregates are known. ties: neighbours in a ranking
    that may as well stand the other way round. partial says which results are not whole.
    """

    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...]
    disagreements: tuple[Disagreement, ...]
    gap: Gap | None
    n_sequences: int | None
    ties: tuple[Tie, ...] = ()
    notes: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    partial: tuple[str, ...] = ()

    def pair(self, a: str, b: str) -> Pair | None:
        """Return how a compares with b; None where only aggregates are known."""
        found = next((p for p in self.pairs if {p.a, p.b} == {a, b}), None)
        return None if found is None else found.of(a)


def ranking(criterion: str, values: Mapping[str, float]) -> Ranking:
    """Return the labels by their values, smallest first; equal ones in the order of their names."""
    order = sorted(values, key=lambda label: (values[label], label))
    equal = tuple(
        math.isclose(values[a], values[b], rel_tol=1e-12) for a, b in itertools.pairwise(order)
    )
    return Ranking(criterion, tuple(order), equal)


def board_order(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Return the rows as tables show them: the reference, then by KLD where all have it, by size.

    Without any of these they keep their order.
    """
    rest = [r for r in rows if not r.is_reference]
    if rest and all("mean_kld" in r.estimates for r in rest):
        rest.sort(key=lambda r: (r.estimates["mean_kld"].value, r.label))
    elif all(r.n_bytes is not None for r in rest):
        rest.sort(key=lambda r: (-(r.n_bytes or 0), r.label))
    return (*(r for r in rows if r.is_reference), *rest)
