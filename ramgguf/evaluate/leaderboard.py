"""What a comparison found: rows, rankings by several criteria, and where these disagree."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from ramgguf.core.documents import Drawn
from ramgguf.evaluate.bootstrap import Difference, Estimate
from ramgguf.evaluate.result import SequenceScore
from ramgguf.evaluate.statistics import DIVERGENCES, STATISTICS

CRITERIA = ("corpus_ppl", "mean_ppl", "median_ppl", "mean_kld")  # all: the lower the better
LABELS = {name: s.label for name, s in STATISTICS.items()} | {
    name: s.label for name, s in DIVERGENCES.items()
}
SIGNIFICANCE = 0.05


class Verdict(StrEnum):
    """Whether two rankings really disagree about two models."""

    SIGNIFICANT = "significant"
    NOISE = "noise"
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


@dataclass(frozen=True)
class Ranking:
    """Labels by a criterion, best first."""

    criterion: str
    order: tuple[str, ...]


@dataclass(frozen=True)
class Reversal:
    """Two models that two criteria rank in opposite ways: `first` prefers better, `second` worse.

    The differences are better − worse in each criterion, p Holm-corrected over all pairs of models;
    wilcoxon_p is of ΔNLL per sequence. All are None where only aggregates are known.
    """

    better: str
    worse: str
    difference_first: Difference | None = None
    difference_second: Difference | None = None
    wilcoxon_p: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Significant where each criterion on its own tells the two models apart."""
        found = (self.difference_first, self.difference_second)
        if any(d is None or d.p is None for d in found):
            return Verdict.UNKNOWN
        both = all(d is not None and d.p is not None and d.p < SIGNIFICANCE for d in found)
        return Verdict.SIGNIFICANT if both else Verdict.NOISE


@dataclass(frozen=True, eq=False)
class Culprit:
    """A sequence that causes a disagreement, and its PPL under each model (by label)."""

    sequence: SequenceScore
    ppl: Mapping[str, float]


@dataclass(frozen=True)
class Disagreement:
    """Where two rankings part. Without the culprits they become `without`.

    culprits is empty when only aggregates are known, or when no tenth of the sequences causes it.
    full_inversion: one ranking is the other backwards.
    """

    first: Ranking
    second: Ranking
    reversals: tuple[Reversal, ...]
    culprits: tuple[Culprit, ...] = ()
    without: tuple[Ranking, Ranking] | None = None

    @property
    def full_inversion(self) -> bool:
        return len(self.first.order) > 1 and self.first.order == self.second.order[::-1]


@dataclass(frozen=True)
class Tie:
    """Two models that follow each other in a ranking whose criterion does not tell them apart.

    difference is better − worse, its p Holm-corrected over all pairs of models.
    """

    criterion: str
    better: str
    worse: str
    difference: Difference


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
    """Rows in the order of the first ranking, a ranking per criterion, and where they disagree.

    ties: neighbours in a ranking that may as well stand the other way round.
    """

    rows: tuple[Row, ...]
    rankings: tuple[Ranking, ...]
    disagreements: tuple[Disagreement, ...]
    gap: Gap | None
    n_sequences: int | None
    ties: tuple[Tie, ...] = ()
    notes: tuple[str, ...] = ()
