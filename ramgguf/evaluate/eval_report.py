"""Everything that can be said about some evaluations together, computed once for every output."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.common_sequences import (
    common_sequences,
    is_reference,
    partial_line,
    why_missing,
)
from ramgguf.evaluate.comparison import compare_common
from ramgguf.evaluate.leaderboard import Leaderboard
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.significance import N_RESAMPLES
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.evaluate.summary import Summary, summarize, unique_labels


@dataclass(frozen=True, eq=False)
class EvalReport:
    """Summaries as the leaderboard's rows stand; the leaderboard, or why there is none.

    failures names the results without a single scored sequence, and what stopped them; partial
    those that lack sequences of their protocol.
    """

    summaries: tuple[Summary, ...]
    board: Leaderboard | None
    refusal: str | None
    failures: tuple[str, ...]
    outlier_ppl: float
    partial: tuple[str, ...] = ()


def eval_report(
    results: Sequence[EvalResult],
    rng: np.random.Generator | None = None,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    n_resamples: int = N_RESAMPLES,
) -> EvalReport:
    """Return summaries and leaderboard of the results, all on the sequences that they share.

    Results that must not be ranked together are summarized on their own, and refusal says why.
    """
    failures = tuple(
        f"{label}: no sequence was scored" + (f" ({why})" if (why := why_missing(r)) else "")
        for label, r in zip(unique_labels(results), results, strict=True)
        if not r.sequences
    )
    try:
        common = common_sequences(results)
    except ResultError as e:
        alone = [r for r in results if r.sequences]
        partial = tuple(p for r in alone if (p := partial_line(r)) is not None)
        found = _summaries(alone, outlier_ppl)
        return EvalReport(found, None, str(e), failures, outlier_ppl, partial)
    board = compare_common(common, rng, outlier_ppl=outlier_ppl, n_resamples=n_resamples)
    by_label = {s.label: s for s in _summaries(common.results, outlier_ppl)}
    ordered = tuple(by_label[row.label] for row in board.rows)
    return EvalReport(ordered, board, None, failures, outlier_ppl, common.partial)


def _summaries(results: Sequence[EvalResult], outlier_ppl: float) -> tuple[Summary, ...]:
    return tuple(
        summarize(r, label=label, outlier_ppl=outlier_ppl, is_reference=is_reference(r, results))
        for label, r in zip(unique_labels(results), results, strict=True)
    )
