"""What `ramgguf eval` and `ramgguf compare` print, from results alone.

The resampling behind ratios of medians has a fixed seed: the same results always print the same
numbers.
"""

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.report import evaluation

_SEED = 42


def study_of(results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL) -> EvalReport:
    """Return the study of the results, always with the same resamples."""
    return eval_report(results, np.random.default_rng(_SEED), outlier_ppl=outlier_ppl)


def print_eval(
    results: Sequence[EvalResult],
    console: Console,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    where: bool = False,
) -> None:
    """Print tables, rankings and findings; with where, KLD by position and class of token, too."""
    evaluation.print_study(study_of(results, outlier_ppl), console, where=where)


def eval_markdown(
    results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL, where: bool = False
) -> str:
    """Return tables and findings as markdown, ready for a model card."""
    return evaluation.study_markdown(study_of(results, outlier_ppl), where=where)


def eval_csv(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return a row per model with every statistic in full precision."""
    return evaluation.study_csv(study_of(results, outlier_ppl))


def eval_json(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return the statistics and the results with every per-sequence score, as one document."""
    document = {
        "schema": "ramgguf.evaluation/1",
        **evaluation.study_json(study_of(results, outlier_ppl)),
        "results": [json.loads(r.without_tokens().to_json()) for r in results],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
