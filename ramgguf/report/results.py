"""What `ramgguf eval` and `ramgguf compare` print, from results alone.

The resampling behind ratios of medians has a fixed seed: the same results always print the same
numbers.
"""

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from ramgguf.core.escape import to_json
from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.report import evaluation

_SEED = 42


def report_of(results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL) -> EvalReport:
    """Return the report of the results, always with the same resamples."""
    return eval_report(results, np.random.default_rng(_SEED), outlier_ppl=outlier_ppl)


def print_eval(
    results: Sequence[EvalResult], console: Console, *, outlier_ppl: float = OUTLIER_PPL
) -> None:
    """Print tables, rankings and findings."""
    evaluation.print_report(report_of(results, outlier_ppl), console)


def eval_markdown(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return tables and findings as markdown, ready for a model card."""
    return evaluation.report_markdown(report_of(results, outlier_ppl))


def eval_csv(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return a row per model with every statistic in full precision."""
    return evaluation.report_csv(report_of(results, outlier_ppl))


def eval_json(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return the statistics and the results with every per-sequence score, as one document."""
    document = {
        "schema": "ramgguf.evaluation/1",
        **evaluation.report_json(report_of(results, outlier_ppl)),
        "results": [json.loads(r.without_tokens().to_json()) for r in results],
    }
    return to_json(document, indent=1)
