"""Values as HTML for notebooks: the tables of the terminal, without scripts and without a network.

Everything that comes from a file is escaped: names of tensors and models are anybody's.
"""

import html
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ramgguf.core.units import format_bytes
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate.embedding_report import embedding_report
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.evaluation import Evaluation
from ramgguf.evaluate.leaderboard import Leaderboard
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.identity import Source
from ramgguf.measure.result import Measurement
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.result import Plan
from ramgguf.report import check, embeddings, memory, plans
from ramgguf.report import frontier as curves
from ramgguf.report import sensitivity as sensing
from ramgguf.report.boards import board_grid
from ramgguf.report.evaluation import grids as study_grids
from ramgguf.report.evaluation import protocol_lines, ranking_grid, statements
from ramgguf.report.grid import Column, Grid, to_html
from ramgguf.report.results import study_of
from ramgguf.report.sentences import findings
from ramgguf.report.verdict import board_verdict, verdict_lines
from ramgguf.sensitivity.result import Sensitivity

_STYLE = (
    ".ramgguf table td,.ramgguf table th{text-align:left;vertical-align:top;padding:.1em .7em}"
    ".ramgguf table .number{text-align:right;white-space:nowrap}"
    ".ramgguf caption{text-align:left;font-weight:bold}"
    ".ramgguf svg{max-width:50em;overflow:visible}.ramgguf .scroll{overflow-x:auto}"
)


def drawing(value: object) -> str | None:
    """Return a value as HTML, None for what is not drawn."""
    match value:
        case Plan():
            return _plan(value)
        case Measurement():
            return _measurement(value)
        case Frontier():
            return _frontier(value)
        case Sensitivity():
            return _sensitivity(value)
        case CheckResult():
            return _check(value)
        case EmbeddingResult():
            return _embeddings([value])
        case Evaluation() if value.embeddings:
            return _embeddings(value.embeddings, value.failures)
        case EvalResult():
            return _evaluation([value])
        case Evaluation():
            return _evaluation(value.results, value.failures)
        case Leaderboard():
            return _board(value)
    return None


def _plan(plan: Plan) -> str:
    grids = [plans.role_grid(plan)]
    told = [plans.size(plan), plans.optimality(plan)]
    if plan.refinement is not None:
        told.append(plans.refinement(plan.refinement))
    if plan.memory is not None:
        grids.append(memory.memory_grid(plan.memory))
        told += [memory.context(plan.memory), *memory.remarks(plan.memory)]
    return _drawn(f"Plan of {_name(plan.source)}", grids, [*told, *plan.notes])


def format_grid(measured: Measurement) -> Grid:
    """Return a row per format: tensors that can take it, their bytes, bpw and SQNR in it."""
    columns = (
        Column("format", number=False),
        Column("tensors"),
        Column("bytes"),
        Column("bpw"),
        Column("median SQNR, dB"),
        Column("lowest"),
    )
    rows = []
    for name in dict.fromkeys(p.format for t in measured.tensors if not t.kept for p in t.points):
        found = [
            (t, p) for t in measured.tensors for p in t.points if p.format == name and not t.kept
        ]
        n_bytes = sum(p.n_bytes for _, p in found)
        sqnr = [p.sqnr_db for _, p in found]
        bpw = 8 * n_bytes / sum(t.n_weights for t, _ in found)
        told = (_decibels(statistics.median_low(sqnr)), _decibels(min(sqnr)))
        rows.append((name, str(len(found)), format_bytes(n_bytes), f"{bpw:.2f}", *told))
    return Grid("", columns, tuple(sorted(rows, key=lambda row: float(row[3]))))


def _decibels(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.1f}"


def _measurement(measured: Measurement) -> str:
    n_kept = sum(t.kept is not None for t in measured.tensors)
    counts = f"{len(measured.tensors)} tensors, {measured.n_weights:,} weights"
    told = [f"{counts}; encoder {measured.encoder}; kept as they are: {n_kept}"]
    if measured.imatrix is not None:
        told.append(f"errors weighed by {measured.imatrix.path}")
    return _drawn(f"Curves of {_name(measured.source)}", [format_grid(measured)], told)


def _frontier(frontier: Frontier) -> str:
    title = f"Best plans of {_name(frontier.source)}"
    told = curves.remarks(frontier)
    return _drawn(title, [curves.curve_grid(frontier)], told, curves.curve_svg(frontier))


def _sensitivity(found: Sensitivity) -> str:
    title = f"Sensitivities of {_name(found.source)}, nats of KLD per unit of NMSE"
    return _drawn(title, [sensing.sensitivity_grid(found)], sensing.remarks(found))


def _check(result: CheckResult) -> str:
    told = [check.conditions(result), *(f"change: {change}" for change in result.advice)]
    answers = [(a.prompt, a.text[:200], "; ".join(a.signs)) for a in result.answers]
    headings = (Column(h, number=False) for h in ("asked", "answered", "signs of collapse"))
    said = Grid("", tuple(headings), tuple(answers)).without_empty_columns()
    grids = [check.check_grid(result), *([said] if answers else [])]
    return _drawn(check.verdict(result), grids, told)


def _evaluation(results: Iterable[EvalResult], failures: Iterable[str] = ()) -> str:
    study = study_of(list(results))
    told = (*verdict_lines(study), *statements(study), *failures, *protocol_lines(study))
    return _drawn("", study_grids(study), told)


def _embeddings(results: Sequence[EmbeddingResult], failures: Iterable[str] = ()) -> str:
    report = embedding_report(results)
    told = (*embeddings.verdict_lines(report), *embeddings.statements(report), *failures)
    return _drawn("", [embeddings.embedding_grid(report)], told)


def _board(board: Leaderboard) -> str:
    grids = [replace(board_grid(board), title="Models"), ranking_grid(board)]
    return _drawn(
        "",
        [grid.without_empty_columns() for grid in grids],
        (*board_verdict(board), *findings(board)),
    )


def _name(source: Source) -> str:
    return source.name or source.path


def _drawn(title: str, grids: Iterable[Grid], told: Iterable[str], picture: str = "") -> str:
    """Return a heading, tables, a picture and remarks; text is escaped, the picture is SVG."""
    heading = f"<p><b>{html.escape(title)}</b></p>\n" if title else ""
    tables = "".join(map(to_html, grids))
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line in told)
    remarks = f"<ul>\n{items}</ul>\n" if items else ""
    return (
        f'<div class="ramgguf"><style>{_STYLE}</style>\n{heading}{tables}{picture}{remarks}</div>\n'
    )
