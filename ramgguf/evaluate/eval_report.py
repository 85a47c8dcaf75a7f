"""Everything that can be said about some evaluations together, computed once for every output."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ramgguf.core.errors import ResultError
from ramgguf.evaluate.comparison import compare_results
from ramgguf.evaluate.leaderboard import Leaderboard
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.evaluate.summary import Summary, summarize, unique_labels


@dataclass(frozen=True, eq=False)
class EvalReport:
    """Summaries in the order of the results; the leaderboard, or why there is none.

    failures names the results without a single scored sequence, and what stopped them.
    """

    summaries: tuple[Summary, ...]
    board: Leaderboard | None
    refusal: str | None
    failures: tuple[str, ...]
    outlier_ppl: float


def eval_report(
    results: Sequence[EvalResult],
    rng: np.random.Generator,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    n_resamples: int = 10_000,
) -> EvalReport:
    """Return summaries and leaderboard of the results.

    Results that must not be ranked together are summarized all the same, and refusal says why.
    """
    labels = unique_labels(results)
    summaries = tuple(
        summarize(r, rng, label=label, outlier_ppl=outlier_ppl, n_resamples=n_resamples)
        for label, r in zip(labels, results, strict=True)
        if r.sequences
    )
    failures = tuple(
        f"{label}: no sequence was scored" + (f" ({r.failure})" if r.failure else "")
        for label, r in zip(labels, results, strict=True)
        if not r.sequences
    )
    board: Leaderboard | None = None
    refusal: str | None = None
    try:
        board = compare_results(results, rng, outlier_ppl=outlier_ppl, n_resamples=n_resamples)
    except ResultError as e:
        refusal = str(e)
    return EvalReport(summaries, board, refusal, failures, outlier_ppl)
