"""`ramgguf report`: one HTML page that holds all it shows and asks nothing of the network."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ramgguf.core.errors import ResultError
from ramgguf.core.escape import html_text, json_text
from ramgguf.core.files import write_atomically
from ramgguf.core.units import format_bytes, format_count
from ramgguf.evaluate.continuations import TrajectoryResult
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.leaderboard import LABELS, Leaderboard
from ramgguf.evaluate.result import FIRST_TOKENS, SequenceScore
from ramgguf.gguf.identity import difference
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.report import figures, plan_figures
from ramgguf.report.boards import board_grids
from ramgguf.report.chart import charted_kld
from ramgguf.report.evaluation import domain_grid, grids, protocol_lines, statements
from ramgguf.report.grid import to_html
from ramgguf.report.numbers import ppl
from ramgguf.report.sentences import findings
from ramgguf.report.trajectories import survival_figure, trajectory_grid, trajectory_line
from ramgguf.report.verdict import board_verdict, verdict_lines
from ramgguf.report.where import where_grids
from ramgguf.report.where_figure import kld_by_position

_MAX_CARDS = 12
_HARDEST = 4  # sequences shown when no model has an outlier

# Nothing may be loaded: what the page shows is in the page.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def write_html(
    path: Path,
    report: EvalReport,
    plans: Sequence[tuple[str, Plan]] = (),
    measurements: Sequence[tuple[str, Measurement]] = (),
    published: Leaderboard | None = None,
    domains: Sequence[tuple[str, EvalReport]] = (),
    trajectories: Sequence[TrajectoryResult] = (),
) -> None:
    """Write the page, whole or not at all; plans and measurements come with their labels.

    Raises RamggufError when plotly is missing, ResultError when path cannot be written.
    """
    text = page(report, plans, measurements, published, domains, trajectories)
    write_atomically(path, text.encode(), error=ResultError)


def page(
    report: EvalReport,
    plans: Sequence[tuple[str, Plan]] = (),
    measurements: Sequence[tuple[str, Measurement]] = (),
    published: Leaderboard | None = None,
    domains: Sequence[tuple[str, EvalReport]] = (),
    trajectories: Sequence[TrajectoryResult] = (),
) -> str:
    """Return the page's HTML; published is a leaderboard of figures without sequences.

    domains are the reports of several texts, which report pools.
    """
    title = html_text(_title(report, plans, measurements, published, trajectories))
    body = "".join(
        (
            *_evaluation(report),
            *_domains(domains),
            *_trajectories(trajectories),
            *_published(published),
            *_plans(plans),
            *_measurements(measurements, plans),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_asset('page.css')}</style>\n"
        f"<script>{_asset('plotly-basic.min.js')}</script>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("ramgguf.report").joinpath("assets", name).read_text(encoding="utf-8")


def _title(
    report: EvalReport,
    plans: Sequence[tuple[str, Plan]],
    measurements: Sequence[tuple[str, Measurement]],
    published: Leaderboard | None,
    trajectories: Sequence[TrajectoryResult],
) -> str:
    """Return the names of what the page shows, the first four and how many more."""
    names = [s.label for s in report.summaries]
    names += [row.label for row in published.rows] if published else []
    names = names or [t.model.label for t in trajectories]
    names = names or [label for label, _ in (*plans, *measurements)]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more} · ramgguf report" if names else "ramgguf report"


# --- evaluations ---


def _evaluation(report: EvalReport) -> Iterator[str]:
    if not report.summaries:
        return
    yield from _verdict(verdict_lines(report))
    if report.board is not None:
        yield from _by_size(report.board)
    yield _section("Results", "Intervals are 95 %; none is claimed where the text is too short.")
    yield from (to_html(grid) for grid in grids(report))
    yield _list(statements(report))
    yield "".join(f'<p class="soft">{html_text(line)}</p>\n' for line in protocol_lines(report))
    yield _section(
        "Every sequence",
        "One point per sequence, with the quartiles. The grey diamond is corpus PPL with its"
        f" interval; crosses right of the dotted line are outliers, PPL > {report.outlier_ppl:g}.",
    )
    yield _figure(figures.ppl_distribution(report), "Distribution of sequence perplexity")
    yield from _cards(report)
    if (delta := figures.delta_nll(report)) is not None:
        yield _section(
            "What quantization did to each sequence",
            "ΔNLL of every sequence against the reference on the same tokens. The grey diamond is"
            " the mean over tokens, the logarithm of PPL(Q)/PPL(base), with its interval; arrows at"
            " the edge are sequences beyond it.",
        )
        yield _figure(delta, "Change of NLL per sequence")
    yield from _where(report)


def _where(report: EvalReport) -> Iterator[str]:
    """Yield where models part from their reference, if the results say so."""
    tables = where_grids(report)
    if not tables:
        return
    yield _section(
        "Where the models part from the reference",
        "Mean KLD of the tokens at each distance from the start of a window (logarithmic), and by"
        f" class of token. The first {FIRST_TOKENS} tokens have next to no context; they are part"
        f" of the mean, and not of the KLD from token {FIRST_TOKENS} on. Probabilities are those of"
        " the token that came.",
    )
    yield _figure(kld_by_position(report), "Mean KLD by position in the window")
    yield from (to_html(grid) for grid in tables)


def _domains(domains: Sequence[tuple[str, EvalReport]]) -> Iterator[str]:
    if not domains:
        return
    yield _section("Text by text", "The figures above pool these texts; every token counts alike.")
    yield from (to_html(domain_grid(label, report)) for label, report in domains)


def _trajectories(found: Sequence[TrajectoryResult]) -> Iterator[str]:
    if not found:
        return
    yield _section(
        "Where texts part",
        "The share of prompts whose greedy continuation is still the reference's, token by token;"
        " bands are 95 % intervals.",
    )
    yield _figure(survival_figure(found), "Share of identical continuations against tokens")
    yield to_html(trajectory_grid(found))
    yield _list(list(dict.fromkeys(trajectory_line(t) for t in found)))


def _published(board: Leaderboard | None) -> Iterator[str]:
    if board is None:
        return
    yield from _verdict(board_verdict(board))
    yield from _by_size(board)
    yield _section("Published figures", "Without sequences: no interval, and no test.")
    yield from (to_html(grid) for grid in board_grids(board))
    yield _list(findings(board))


def _verdict(lines: Sequence[str]) -> Iterator[str]:
    yield from (f'<p class="verdict">{html_text(line)}</p>\n' for line in lines)


def _by_size(board: Leaderboard) -> Iterator[str]:
    """Yield KLD and perplexity against size, where sizes are known."""
    made = [
        _figure(figures.board_by_size(board, criterion), f"{LABELS[criterion]} against file size")
        for criterion in (charted_kld(board), "corpus_ppl")
    ]
    if not any(made):
        return
    yield _section(
        "Quality against size",
        "Lower is better; smaller is to the left. The dotted line joins the files that no smaller"
        " one beats. Filled marks are KLD or corpus PPL, open ones the median of sequence PPL:"
        " where these part, a few sequences decide the first. The dashed line is the reference.",
    )
    yield f'<div class="pair">{"".join(made)}</div>\n'


def _cards(report: EvalReport) -> Iterator[str]:
    """Yield the outliers with their text, or the hardest sequences where there are none."""
    scores = [{x.index: x for x in s.result.sequences} for s in report.summaries]
    worst: dict[int, SequenceScore] = {}
    for s in report.summaries:
        hardest = sorted(s.result.sequences, key=lambda x: -x.ppl)[:_HARDEST]
        for x in s.outliers or (() if _any_outlier(report) else hardest):
            if x.index not in worst or x.ppl > worst[x.index].ppl:
                worst[x.index] = x
    ranked = sorted(worst.values(), key=lambda x: -x.ppl)
    what = "Outliers and their text" if _any_outlier(report) else "No outliers; the hardest text"
    more = f" ({_MAX_CARDS} of {len(ranked)})" if len(ranked) > _MAX_CARDS else ""
    yield f'<h3>{what}{more}</h3>\n<div class="cards">\n'
    for x in ranked[:_MAX_CARDS]:
        title = f"#{x.index}" + (f" · {x.title}" if x.title else "")
        rows = "".join(
            f'<tr><td>{html_text(s.label)}</td><td class="number">{ppl(known[x.index].ppl)}</td>'
            "</tr>"
            for s, known in zip(report.summaries, scores, strict=True)
            if x.index in known
        )
        yield (
            f'<div class="card"><h4>{html_text(title)}</h4><table>{rows}</table>'
            f"<blockquote>{html_text(x.excerpt)} …</blockquote></div>\n"
        )
    yield "</div>\n"


def _any_outlier(report: EvalReport) -> bool:
    return any(s.outliers for s in report.summaries)


# --- plans and measurements ---


def _plans(plans: Sequence[tuple[str, Plan]]) -> Iterator[str]:
    if not plans:
        return
    yield _section(
        "Where the bits go",
        "Bits per weight by role and layer; the first column holds what belongs to no layer."
        " Tensors that are never quantized are left out.",
    )
    for label, plan in plans:
        kept = [a for a in plan.assignments if plan_figures.is_kept(a)]
        gap = "proven optimal" if plan.gap == 0 else f"within {plan.gap:.1g} of the optimum, proven"
        yield f"<h3>{html_text(label)}</h3>\n"
        yield (
            f'<p class="soft">{format_bytes(plan.n_bytes)} of a budget of'
            f" {format_bytes(plan.budget)}; {plan.bpw:.3f} bits per weight; objective "
            f"{html_text(plan.objective)}, {gap}; kept as found: {len(kept)} of "
            f"{format_count(len(plan.assignments), 'tensor')}, "
            f"{format_bytes(sum(a.n_bytes for a in kept))}.</p>\n"
        )
        yield _figure(plan_figures.bits_by_layer(plan), f"Bits per weight of {label}")


def _measurements(
    measurements: Sequence[tuple[str, Measurement]], plans: Sequence[tuple[str, Plan]]
) -> Iterator[str]:
    if not measurements:
        return
    yield _section(
        "Rate–distortion curves",
        "What a tensor loses in each format against what it costs. Rings mark what the plans"
        " above chose. The dotted line passes through the formats that no other beats.",
    )
    base = figures.figure("bits per weight", "NMSE (logarithmic)", 440)
    base.update_layout(showlegend=True, legend={"x": 0.99, "xanchor": "right", "y": 0.98})
    nmse = [p.nmse for _, m in measurements for t in m.tensors for p in t.points if p.nmse > 0]
    if nmse:
        figures.logarithmic("y", base, nmse)
    for i, (label, measurement) in enumerate(measurements):
        same = [(name, p) for name, p in plans if difference(p.source, measurement.source) is None]
        yield (
            f"<h3>{html_text(label)}</h3>\n"
            f'<p><label for="tensor-{i}">Tensor</label> <select id="tensor-{i}"></select></p>\n'
            f'<figure><div class="plot" data-curves="curves-{i}" data-layout="layout-{i}"'
            f' data-select="tensor-{i}" role="img"'
            ' aria-label="Rate–distortion curve of the chosen tensor"></div></figure>\n'
        )
        yield _data(f"curves-{i}", plan_figures.curves(measurement, same))
        yield _data(f"layout-{i}", json.loads(base.to_json()))


# --- pieces ---


def _section(title: str, text: str) -> str:
    return f'<h2>{html_text(title)}</h2>\n<p class="soft">{html_text(text)}</p>\n'


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{html_text(i)}</li>\n" for i in items) + "</ul>\n"


def _figure(made: figures.Figure | None, label: str) -> str:
    """Return the figure's place and its data; nothing for no figure."""
    if made is None:
        return ""
    data = json.loads(made.to_json())
    name = "figure-" + hashlib.sha256(json.dumps([label, data]).encode()).hexdigest()[:12]
    return (
        f'<figure><div class="plot" data-figure="{name}" role="img"'
        f' aria-label="{html_text(label)}"></div></figure>\n'
        f"{_data(name, data)}"
    )


def _data(name: str, value: Any) -> str:
    """Return a JSON block; no text in it can end the script element."""
    text = json_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
