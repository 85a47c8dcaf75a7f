"""What `ramgguf eval` and `ramgguf compare` print, from results alone.

The resampling behind ratios of medians has a fixed seed: the same results always print the same
numbers.
"""

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from ramgguf.core.escape import to_json
from ramgguf.evaluate.domains import by_text, pooled
from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.report import evaluation
from ramgguf.report.grid import to_markdown
from ramgguf.report.terminal import print_grid

_SEED = 42


def report_of(results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL) -> EvalReport:
    """Return the report of the results, always with the same resamples."""
    return eval_report(results, np.random.default_rng(_SEED), outlier_ppl=outlier_ppl)


POOLED = "all texts"


def reports(
    results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL
) -> tuple[tuple[str, EvalReport], ...]:
    """Return the report of each text with its name, and last that of all texts pooled.

    Of one text there is its report alone. Windows of several lengths of one text are not pooled:
    then the first comes last.
    """
    domains = by_text(results)
    if len(domains) < 2:
        return ((POOLED, report_of(results, outlier_ppl)),)
    made = [(d.label, report_of(d.results, outlier_ppl)) for d in domains]
    together = pooled(domains)
    if together is None:
        return (*made, made[0])
    return (*made, (POOLED, report_of(together, outlier_ppl)))


def print_eval(
    results: Sequence[EvalResult],
    console: Console,
    *,
    outlier_ppl: float = OUTLIER_PPL,
    where: bool = False,
) -> None:
    """Print tables, rankings and findings; of several texts, a table each before these.

    With where, also KLD by position and class of token.
    """
    *parts, (_, last) = reports(results, outlier_ppl)
    for label, report in parts:
        print_grid(console, evaluation.domain_grid(label, report))
        console.print()
    evaluation.print_report(last, console, where=where)


def eval_markdown(
    results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL, where: bool = False
) -> str:
    """Return tables and findings as markdown, ready for a model card."""
    *parts, (_, last) = reports(results, outlier_ppl)
    tables = [to_markdown(evaluation.domain_grid(label, report)) for label, report in parts]
    named = [f"**{label}**\n\n{table}" for (label, _), table in zip(parts, tables, strict=True)]
    return "\n".join((*named, evaluation.report_markdown(last, where=where)))


def eval_csv(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return a row per model with every statistic in full precision."""
    return evaluation.report_csv(*(report for _, report in reports(results, outlier_ppl)))


def eval_json(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return the statistics and the results with every per-sequence score, as one document."""
    *parts, (_, last) = reports(results, outlier_ppl)
    document = {
        "schema": "ramgguf.evaluation/1",
        **evaluation.report_json(last),
        **({"texts": {k: evaluation.report_json(s) for k, s in parts}} if parts else {}),
        "results": [json.loads(r.without_tokens().to_json()) for r in results],
    }
    return to_json(document, indent=1)
