"""A leaderboard that says where its rankings disagree, why, and whether this is significant."""

import itertools
from collections.abc import Sequence

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.common_sequences import Common, common_sequences
from ramgguf.evaluate.evaluation import Evaluation
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.leaderboard import (
    CRITERIA,
    Aggregate,
    Disagreement,
    Gap,
    Leaderboard,
    Ranking,
    Reversal,
    Row,
    board_order,
    ranking,
)
from ramgguf.evaluate.paired_tests import PairedTests
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.significance import N_RESAMPLES
from ramgguf.evaluate.statistics import OUTLIER_PPL

_SEED = 42  # of the resampling behind ratios of medians, as on the command line


def compare_published(aggregates: Sequence[Aggregate], notes: Sequence[str] = ()) -> Leaderboard:
    """Return the leaderboard of published figures: rankings, but no significance."""
    rows = [
        Row(
            a.label,
            a.n_bytes,
            {c: Estimate(v) for c in CRITERIA if (v := getattr(a, c)) is not None},
            a.n_outliers,
        )
        for a in aggregates
    ]
    _check_labels(rows)
    found = tuple(
        Disagreement(x, y, tuple(Reversal(a, b) for a, b in pairs))
        for x, y, pairs in _disagreeing(rows)
    )
    rankings = _rankings(rows)
    return Leaderboard(
        board_order(tuple(rows)), rankings, found, _gap(rows), n_sequences=None, notes=tuple(notes)
    )


def compare_results(
    results: Sequence[EvalResult],
    rng: np.random.Generator | None = None,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    n_resamples: int = N_RESAMPLES,
) -> Leaderboard:
    """Return the leaderboard of results on the sequences that all of them finished.

    Their reference is ranked with them. KLD is a criterion where all have the same reference.
    Raises ResultError when the results were not measured alike (text, protocol, tokenizer, tokens,
    engine) or share nothing.
    """
    common = common_sequences(results)
    return compare_common(common, rng, outlier_ppl=outlier_ppl, n_resamples=n_resamples)


def compare_common(
    common: Common,
    rng: np.random.Generator | None = None,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    n_resamples: int = N_RESAMPLES,
) -> Leaderboard:
    """Return the leaderboard of results that were cut to their common sequences."""
    tests = PairedTests(common.results, rng or np.random.default_rng(_SEED), n_resamples)
    rows = tests.rows(outlier_ppl)
    rankings = _rankings(rows)
    return Leaderboard(
        rows=board_order(tuple(rows)),
        rankings=rankings,
        disagreements=tuple(tests.disagreement(*parted) for parted in _disagreeing(rows)),
        gap=_gap(rows),
        n_sequences=len(common.indices),
        ties=tests.ties(rankings),
        notes=(*common.notes, *tests.notes),
        pairs=tests.pairs,
        partial=common.partial,
    )


def compare(results: Evaluation | Sequence[EvalResult]) -> Leaderboard:
    """Return rankings by several criteria, and where they disagree or cannot tell models apart.

    Raises ResultError when the results were not measured alike.
    """
    found = results.results if isinstance(results, Evaluation) else results
    return compare_results(found)


def _check_labels(rows: Sequence[Row]) -> None:
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ResultError(f"two rows are called {label!r}; give each its own label")


def _disagreeing(
    rows: Sequence[Row],
) -> list[tuple[Ranking, Ranking, list[tuple[str, str]]]]:
    """Return each two rankings that part, and the pairs that the first orders (better, worse)."""
    found = []
    for x, y in itertools.combinations(CRITERIA, 2):
        both = [r for r in rows if x in r.estimates and y in r.estimates]
        pairs = [
            (a.label, b.label)
            for a, b in itertools.permutations(both, 2)
            if a.estimates[x].value < b.estimates[x].value
            and a.estimates[y].value > b.estimates[y].value
        ]
        if pairs:
            found.append((_ranking(x, both), _ranking(y, both), pairs))
    return found


def _ranking(criterion: str, rows: Sequence[Row]) -> Ranking:
    known = {r.label: r.estimates[criterion].value for r in rows if criterion in r.estimates}
    return ranking(criterion, known)


def _rankings(rows: Sequence[Row]) -> tuple[Ranking, ...]:
    return tuple(r for c in CRITERIA if (r := _ranking(c, rows)).order)


def _gap(rows: Sequence[Row]) -> Gap | None:
    gaps = [
        Gap(r.label, r.estimates["corpus_ppl"].value, r.estimates["median_ppl"].value)
        for r in rows
        if {"corpus_ppl", "median_ppl"} <= r.estimates.keys()
    ]
    return max(gaps, key=lambda g: abs(g.value), default=None)
