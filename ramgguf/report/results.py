"""What `ramgguf eval` and `ramgguf compare` print, from results alone.

The resampling behind ratios of medians has a fixed seed: the same results always print the same
numbers.
"""

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from ramgguf.evaluate.domains import by_text, pooled
from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import OUTLIER_PPL
from ramgguf.report import evaluation
from ramgguf.report.grid import to_markdown
from ramgguf.report.terminal import print_grid

_SEED = 42


def study_of(results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL) -> EvalReport:
    """Return the study of the results, always with the same resamples."""
    return eval_report(results, np.random.default_rng(_SEED), outlier_ppl=outlier_ppl)


POOLED = "all texts"


def studies(
    results: Sequence[EvalResult], outlier_ppl: float = OUTLIER_PPL
) -> tuple[tuple[str, EvalReport], ...]:
    """Return the study of each text with its name, and last that of all texts pooled.

    Of one text there is its study alone. Windows of several lengths of one text are not pooled:
    then the first comes last.
    """
    domains = by_text(results)
    if len(domains) < 2:
        return ((POOLED, study_of(results, outlier_ppl)),)
    made = [(d.label, study_of(d.results, outlier_ppl)) for d in domains]
    together = pooled(domains)
    if together is None:
        return (*made, made[0])
    return (*made, (POOLED, study_of(together, outlier_ppl)))


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
    *parts, (_, last) = studies(results, outlier_ppl)
    for label, study in parts:
        print_grid(console, evaluation.domain_grid(label, study))
        console.print()
    evaluation.print_study(last, console, where=where)


def eval_markdown(
    results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL, where: bool = False
) -> str:
    """Return tables and findings as markdown, ready for a model card."""
    *parts, (_, last) = studies(results, outlier_ppl)
    tables = [to_markdown(evaluation.domain_grid(label, study)) for label, study in parts]
    named = [f"**{label}**\n\n{table}" for (label, _), table in zip(parts, tables, strict=True)]
    return "\n".join((*named, evaluation.study_markdown(last, where=where)))


def eval_csv(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return a row per model with every statistic in full precision."""
    return evaluation.study_csv(*(study for _, study in studies(results, outlier_ppl)))


def eval_json(results: Sequence[EvalResult], *, outlier_ppl: float = OUTLIER_PPL) -> str:
    """Return the statistics and the results with every per-sequence score, as one document."""
    *parts, (_, last) = studies(results, outlier_ppl)
    document = {
        "schema": "ramgguf.evaluation/1",
        **evaluation.study_json(last),
        **({"texts": {k: evaluation.study_json(s) for k, s in parts}} if parts else {}),
        "results": [json.loads(r.without_tokens().to_json()) for r in results],
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
