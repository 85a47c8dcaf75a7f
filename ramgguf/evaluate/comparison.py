"""A leaderboard that says where its own rankings disagree, why, and whether that means anything."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.bootstrap import Estimate
from ramgguf.evaluate.evaluation import Evaluation
from ramgguf.evaluate.leaderboard import (
    CRITERIA,
    Aggregate,
    Disagreement,
    Gap,
    Leaderboard,
    Ranking,
    Reversal,
    Row,
)
from ramgguf.evaluate.paired_tests import PairedTests
from ramgguf.evaluate.result import EvalResult, incomparable
from ramgguf.evaluate.statistics import OUTLIER_PPL

_SEED = 42  # of the resampling behind intervals and p-values, as on the command line
_MIN_FINISHED = 0.9  # of the most complete result's sequences; below, a model is not ranked


def compare_published(aggregates: Sequence[Aggregate]) -> Leaderboard:
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
    return _leaderboard(rows, found, n_sequences=None, notes=())


def compare_results(
    results: Sequence[EvalResult],
    rng: np.random.Generator,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    n_resamples: int = 10_000,
) -> Leaderboard:
    """Return the leaderboard of results on the sequences that all of them finished.

    KLD is a criterion where all results have the same reference. Raises ResultError when the
    results were not measured alike (text, protocol, tokenizer, tokens, engine) or share nothing.
    """
    check_comparable(results)
    ranked, shared, notes = _ranked_together(results)
    # enough resamples that the smallest possible p survives the correction over all pairs
    n_pairs = len(ranked) * (len(ranked) - 1) // 2
    evidence = PairedTests(ranked, shared, rng, max(n_resamples, min(400 * n_pairs, 100_000)))
    rows = evidence.rows(outlier_ppl)
    found = tuple(evidence.disagreement(*parted) for parted in _disagreeing(rows))
    board = _leaderboard(rows, found, n_sequences=len(shared), notes=(*notes, *evidence.notes))
    return replace(board, ties=evidence.ties(board.rankings))


def check_comparable(results: Sequence[EvalResult]) -> None:
    """Raise ResultError when there are no results, or two that were not measured alike."""
    if not results:
        raise ResultError("nothing to compare: expected at least one result")
    for a, b in itertools.combinations(results, 2):
        if reasons := incomparable(a, b):
            raise ResultError(
                f"{a.model.path} and {b.model.path} may not be ranked together; they differ in "
                + "; ".join(reasons)
                + ". Evaluate them again in one run"
            )


def _check_labels(rows: Sequence[Row]) -> None:
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ResultError(f"two rows are called {label!r}; give each its own label")


def _ranked_together(
    results: Sequence[EvalResult],
) -> tuple[list[EvalResult], list[int], list[str]]:
    """Return the results that can be ranked, the sequences they share, and what was left out."""
    most = max(len(r.sequences) for r in results)
    ranked = [r for r in results if r.sequences and len(r.sequences) >= _MIN_FINISHED * most]
    notes = [
        f"{r.model.label} finished {len(r.sequences)} of {r.protocol.n_seq} sequences and is not "
        f"ranked" + (f": {r.failure}" if r.failure else "")
        for r in results
        if not any(r is kept for kept in ranked)
    ]
    notes += [
        f"{r.model.label} gave NaN or infinite logits in {len(r.broken)} sequences, which no model "
        "is ranked on: distrust it"
        for r in ranked
        if r.broken
    ]
    if not ranked:
        raise ResultError("nothing to compare: no result has a finished sequence")
    shared = set.intersection(*({s.index for s in r.sequences} for r in ranked))
    if not shared:
        raise ResultError("nothing to compare: no sequence was finished by all results")
    if len(shared) < most:
        notes.append(f"ranked on the {len(shared)} sequences that all finished, of {most}")
    return ranked, sorted(shared), notes


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
    known = [r for r in rows if criterion in r.estimates]
    known.sort(key=lambda r: r.estimates[criterion].value)
    return Ranking(criterion, tuple(r.label for r in known))


def _leaderboard(
    rows: Sequence[Row],
    disagreements: tuple[Disagreement, ...],
    *,
    n_sequences: int | None,
    notes: Sequence[str],
) -> Leaderboard:
    rankings = tuple(r for c in CRITERIA if (r := _ranking(c, rows)).order)
    gaps = [
        Gap(r.label, r.estimates["corpus_ppl"].value, r.estimates["median_ppl"].value)
        for r in rows
        if {"corpus_ppl", "median_ppl"} <= r.estimates.keys()
    ]
    order = rankings[0].order if rankings else ()
    return Leaderboard(
        rows=tuple(sorted(rows, key=lambda r: (*order, r.label).index(r.label))),
        rankings=rankings,
        disagreements=disagreements,
        gap=max(gaps, key=lambda g: abs(g.value), default=None),
        n_sequences=n_sequences,
        notes=tuple(notes),
    )


def compare(results: Evaluation | Sequence[EvalResult]) -> Leaderboard:
    """Return rankings by several criteria, and where they disagree or cannot tell models apart.

    Raises ResultError when the results were not measured alike.
    """
    found = results.results if isinstance(results, Evaluation) else results
    return compare_results(found, np.random.default_rng(_SEED))
