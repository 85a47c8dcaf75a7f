"""Values as HTML for notebooks: the tables of the terminal, without scripts and without a network.

Everything that comes from a file is escaped: names of tensors and models are anybody's.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ramgguf.core.escape import html_text
from ramgguf.core.units import format_bytes, format_count
from ramgguf.deploy.result import Answer, CheckResult
from ramgguf.evaluate.embedding_report import embedding_report
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.evaluation import Evaluation
from ramgguf.evaluate.leaderboard import Leaderboard
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.identity import Source
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.result import Plan
from ramgguf.report import check, embeddings, memory, plans
from ramgguf.report import frontier as curves
from ramgguf.report import sensitivity as sensing
from ramgguf.report.boards import board_grids
from ramgguf.report.evaluation import grids as report_grids
from ramgguf.report.evaluation import protocol_lines, statements
from ramgguf.report.grid import Field, Grid, grid_of, to_html
from ramgguf.report.results import report_of
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
    lines = [plans.size(plan), plans.optimality(plan)]
    lines += plans.after_planning(plan)
    if plan.memory is not None:
        grids.append(memory.memory_grid(plan.memory))
        lines += [memory.context(plan.memory), *memory.remarks(plan.memory, plan.division)]
    return _drawn(f"Plan of {_name(plan.source)}", grids, [*lines, *plan.notes])


@dataclass(frozen=True)
class _InFormat:
    """The tensors that can take a format, all in it."""

    name: str
    points: list[tuple[TensorMeasurement, Point]]

    @property
    def n_bytes(self) -> int:
        return sum(p.n_bytes for _, p in self.points)

    @property
    def bpw(self) -> float:
        return 8 * self.n_bytes / sum(t.n_weights for t, _ in self.points)

    def sqnr(self, statistic: Callable[[list[float]], float]) -> str:
        return _decibels(statistic([p.sqnr_db for _, p in self.points]))


def format_grid(measured: Measurement) -> Grid:
    """Return a row per format: tensors that can take it, their bytes, bpw and SQNR in it."""
    formats: dict[str, _InFormat] = {}
    for tensor in measured.tensors:
        for point in () if tensor.kept else tensor.points:
            found = formats.setdefault(point.format, _InFormat(point.format, []))
            found.points.append((tensor, point))
    fields: list[Field[_InFormat]] = [
        Field("format", lambda f: f.name, number=False),
        Field("tensors", lambda f: str(len(f.points))),
        Field("bytes", lambda f: format_bytes(f.n_bytes)),
        Field("bpw", lambda f: f"{f.bpw:.2f}"),
        Field("median SQNR, dB", lambda f: f.sqnr(statistics.median_low)),
        Field("lowest", lambda f: f.sqnr(min)),
    ]
    return grid_of("", fields, sorted(formats.values(), key=lambda f: f.bpw))


def _decibels(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.1f}"


def _measurement(measured: Measurement) -> str:
    n_kept = sum(t.kept is not None for t in measured.tensors)
    counts = f"{format_count(len(measured.tensors), 'tensor')}, {measured.n_weights:,} weights"
    lines = [f"{counts}; encoder {measured.encoder}; kept as they are: {n_kept}"]
    if measured.imatrix is not None:
        lines.append(f"errors weighed by {measured.imatrix.path}")
    return _drawn(f"Curves of {_name(measured.source)}", [format_grid(measured)], lines)


def _frontier(frontier: Frontier) -> str:
    title = f"Best plans of {_name(frontier.source)}"
    lines = curves.remarks(frontier)
    return _drawn(title, [curves.curve_grid(frontier)], lines, curves.curve_svg(frontier))


def _sensitivity(found: Sensitivity) -> str:
    title = f"Sensitivities of {_name(found.source)}, nats of KLD per unit of NMSE"
    return _drawn(title, [sensing.sensitivity_grid(found)], sensing.remarks(found))


def _check(result: CheckResult) -> str:
    lines = [check.conditions(result), *(f"change: {change}" for change in result.advice)]
    fields: list[Field[Answer]] = [
        Field("asked", lambda a: a.prompt, number=False),
        Field("answered", lambda a: a.text[:200], number=False),
        Field("signs of collapse", lambda a: "; ".join(a.signs), number=False),
    ]
    said = grid_of("", fields, result.answers).without_empty_columns()
    grids = [check.check_grid(result), *([said] if result.answers else [])]
    return _drawn(check.verdict(result), grids, lines)


def _evaluation(results: Iterable[EvalResult], failures: Iterable[str] = ()) -> str:
    report = report_of(list(results))
    lines = (*verdict_lines(report), *statements(report), *failures, *protocol_lines(report))
    return _drawn("", report_grids(report), lines)


def _embeddings(results: Sequence[EmbeddingResult], failures: Iterable[str] = ()) -> str:
    report = embedding_report(results)
    lines = (*embeddings.verdict_lines(report), *embeddings.statements(report), *failures)
    return _drawn("", [embeddings.embedding_grid(report)], lines)


def _board(board: Leaderboard) -> str:
    models, *rankings = board_grids(board)
    grids = [replace(models, title="Models"), *rankings]
    return _drawn("", grids, (*board_verdict(board), *findings(board)))


def _name(source: Source) -> str:
    return source.name or source.path


def _drawn(title: str, grids: Iterable[Grid], lines: Iterable[str], picture: str = "") -> str:
    """Return a heading, tables, a picture and remarks; text is escaped, the picture is SVG."""
    heading = f"<p><b>{html_text(title)}</b></p>\n" if title else ""
    tables = "".join(map(to_html, grids))
    items = "".join(f"<li>{html_text(line)}</li>\n" for line in lines)
    remarks = f"<ul>\n{items}</ul>\n" if items else ""
    return (
        f'<div class="ramgguf"><style>{_STYLE}</style>\n{heading}{tables}{picture}{remarks}</div>\n'
    )
