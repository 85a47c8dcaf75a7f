"""Figures of evaluations, drawn with plotly; the page gives them the colours of its theme."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ramgguf.core.errors import RamggufError
from ramgguf.core.escape import html_text
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.leaderboard import KLD_CRITERIA, LABELS, Leaderboard
from ramgguf.evaluate.result import SequenceScore
from ramgguf.evaluate.summary import Summary
from ramgguf.report.chart import Point, points
from ramgguf.report.numbers import kld, ppl

Figure = Any  # plotly.graph_objects.Figure: plotly is an optional package without types

# at least 3.6 : 1 against white and against the dark background, told apart by the colour-blind
COLOURS = ("#3b82c4", "#c8641e", "#1b8a6b", "#a8559c", "#94791a", "#7a6fd6", "#c94c5c", "#5f7387")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "pentagon")
_ROW_PIXELS = 64  # height of a model's row where models are stacked
_GB = 1e9
_MIN_DECADES = 0.3  # of a logarithmic axis: one point alone is no magnifying glass


def graph_objects() -> Any:
    """Return plotly.graph_objects; raises RamggufError that names the extra to install."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise RamggufError(
            "the HTML report needs plotly; install it with: pip install 'ramgguf[report]'"
        ) from None
    return plotly.graph_objects


def figure(x_title: str, y_title: str, height: int) -> Figure:
    """Return an empty figure in the page's style."""
    made = graph_objects().Figure()
    made.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 20, "t": 16, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"align": "left", "font": {"size": 12}},
        showlegend=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#777", "activecolor": "#3b82c4"},
        hovermode="closest",
    )
    made.update_xaxes(title={"text": x_title}, zeroline=False, automargin=True)
    made.update_yaxes(title={"text": y_title}, zeroline=False, automargin=True)
    return made


def logarithmic(axis: str, fig: Figure, values: Sequence[float]) -> None:
    """Make the axis ("x" or "y") logarithmic, with a readable number of labelled ticks.

    Values without a place on it, zero and infinity, do not count.
    """
    placed = [v for v in values if 1e-100 < v < 1e100] or [1.0]
    low, high = math.log10(min(placed)), math.log10(max(placed))
    margin = max(0.05 * (high - low) + 0.02, (_MIN_DECADES - (high - low)) / 2)
    low, high = low - margin, high + margin
    ticks = log_ticks(10**low, 10**high)
    update = {"x": fig.update_xaxes, "y": fig.update_yaxes}[axis]
    update(
        type="log",
        tickvals=ticks,
        ticktext=[f"{t:,.10g}" if t >= 1e-6 else f"{t:.0e}" for t in ticks],
        range=[low, high],
    )


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from low to high: powers of ten, then finer steps for short ranges."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            return [float(f"{t:.6g}") for t in ticks]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(m for m in (1, 2, 5) if m * step <= (high - low) / 3 or m == 1)
    first = math.ceil(low / step)
    return [float(f"{k * step:.6g}") for k in range(first, math.floor(high / step) + 1)]


def style(i: int) -> dict[str, Any]:
    """Return colour and symbol of the model number i, the same in every figure."""
    return {"color": COLOURS[i % len(COLOURS)], "symbol": SYMBOLS[i % len(SYMBOLS)]}


def board_by_size(board: Leaderboard, criterion: str) -> Figure | None:
    """Return a criterion against file size: labels at the points, the Pareto front, the reference.

    The median of sequence PPL stands beside corpus PPL, open. None where no size is known.
    """
    go = graph_objects()
    placed = points(board.rows, criterion)
    if not placed:
        return None
    unit = f"{LABELS[criterion]} (nats per token)" if criterion in KLD_CRITERIA else "perplexity"
    write = kld if criterion in KLD_CRITERIA else ppl
    fig = figure("file size (GB)", unit, 420)
    front = sorted((p for p in placed if p.on_front), key=lambda p: p.size)
    if len(front) > 1:
        fig.add_trace(
            go.Scatter(
                x=[p.size / _GB for p in front],
                y=[p.value for p in front],
                mode="lines",
                line={"dash": "dot", "width": 1, "color": "#777"},
                hoverinfo="skip",
            )
        )
    numbers = {row.label: i for i, row in enumerate(board.rows)}
    rows = {row.label: row for row in board.rows}
    low, high = _padded([p.size / _GB for p in placed])
    sides = _label_sides(placed, low, high)
    shown: list[float] = []
    for p in placed:
        row, mark, label = rows[p.label], style(numbers[p.label]), html_text(p.label)
        for name in (criterion, "median_ppl") if criterion == "corpus_ppl" else (criterion,):
            if name not in row.estimates:
                continue
            found, is_open = row.estimates[name], name != criterion
            shown += [x for x in (found.value, found.low, found.high) if x is not None and x > 0]
            fig.add_trace(
                go.Scatter(
                    x=[p.size / _GB + (0.012 * (high - low) if is_open else 0)],
                    y=[found.value],
                    error_y=_bars(found, mark["color"]),
                    mode="markers" if is_open else "markers+text",
                    text=None if is_open else [shortened(label)],
                    textposition=sides[p.label],
                    textfont={"size": 11},
                    cliponaxis=False,
                    marker={
                        **mark,
                        "symbol": mark["symbol"] + ("-open" if is_open else ""),
                        "size": 10,
                    },
                    hovertemplate=f"{label}<br>{LABELS[name]} {_with_interval(found, write)}<br>"
                    f"{p.size / _GB:.3f} GB<extra></extra>",
                )
            )
    for row in board.rows:
        if row.is_reference and criterion in row.estimates:
            line = {"dash": "dash", "width": 1, "color": "#777"}
            fig.add_hline(y=row.estimates[criterion].value, line=line)
    fig.update_xaxes(range=[low, high])
    if criterion in KLD_CRITERIA:
        logarithmic("y", fig, shown)
    return fig


def shortened(label: str, most: int = 26) -> str:
    """Return the label, its middle left out where it is longer than `most` characters."""
    half = (most - 1) // 2
    return label if len(label) <= most else f"{label[:half]}…{label[-half:]}"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Return a range around the values, of a width also where they are one and the same."""
    low, high = min(values), max(values)
    margin = 0.15 * (high - low) if high > 1.001 * low else 0.1 * high
    return low - margin, high + margin


def _label_sides(placed: Sequence[Point], low: float, high: float) -> dict[str, str]:
    """Return where each label stands: towards the middle, and above and below by turns."""
    sides = {}
    for i, p in enumerate(sorted(placed, key=lambda p: (p.size, p.value))):
        side = "right" if p.size / _GB < (low + high) / 2 else "left"
        sides[p.label] = f"{'top' if i % 2 == 0 else 'bottom'} {side}"
    return sides


def _bars(found: Estimate, colour: str) -> dict[str, Any]:
    if found.low is None or found.high is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [found.high - found.value],
        "arrayminus": [found.value - found.low],
        "thickness": 1.5,
        "width": 4,
        "color": colour,
    }


def _with_interval(found: Estimate, write: Any) -> str:
    if found.low is None or found.high is None:
        return str(write(found.value))
    return f"{write(found.value)} (95 %: {write(found.low)} to {write(found.high)})"


def ppl_distribution(report: EvalReport) -> Figure:
    """Return every sequence's PPL, a row per model; outliers are named, corpus PPL is marked."""
    go = graph_objects()
    fig = figure("sequence perplexity (logarithmic)", "", height(len(report.summaries)))
    values = [x.ppl for s in report.summaries for x in s.result.sequences]
    low, high = math.log10(max(min(values), 1e-100)), math.log10(min(max(values), 1e100))
    for i, s in enumerate(report.summaries):
        scores = s.result.sequences
        hover_texts = [hover_text(x) for x in scores]
        fig.add_traces(strip(i, i, [x.ppl for x in scores], hover_texts))
        fig.add_trace(diamond(i, s.label, s.estimates["corpus_ppl"], "corpus PPL", ppl))
        if s.outliers:
            places = [(math.log10(x.ppl) - low) / ((high - low) or 1) for x in s.outliers]
            sides = label_places(places)
            fig.add_trace(
                go.Scatter(
                    x=[x.ppl for x in s.outliers],
                    y=[i] * len(s.outliers),
                    mode="markers+text",
                    text=[
                        f"#{x.index}" if side else ""
                        for x, side in zip(s.outliers, sides, strict=True)
                    ],
                    textposition=[side or "top center" for side in sides],
                    marker={"color": COLOURS[i % len(COLOURS)], "symbol": "x", "size": 9},
                    hovertext=[hover_text(x) for x in s.outliers],
                    hoverinfo="text",
                )
            )
    fig.add_vline(x=report.outlier_ppl, line={"dash": "dot", "width": 1, "color": "#777"})
    logarithmic("x", fig, values)
    name_rows(fig, [s.label for s in report.summaries])
    return fig


def label_places(places: Sequence[float], near: float = 0.14) -> list[str | None]:
    """Return where the label of each place (0 to 1) stands, None where it would cover another.

    The first ones have the choice.
    """
    taken: dict[str, list[float]] = {"top center": [], "bottom center": []}
    found: list[str | None] = []
    for x in places:
        free = (s for s, others in taken.items() if all(abs(x - o) >= near for o in others))
        side = next(free, None)
        if side is not None:
            taken[side].append(x)
        found.append(side)
    return found


def name_rows(fig: Figure, labels: Sequence[str]) -> None:
    """Give row i of the figure, at y = i, its label; the first is on top."""
    fig.update_yaxes(
        tickvals=list(range(len(labels))),
        ticktext=[shortened(html_text(label)) for label in labels],
        range=[len(labels) - 0.5, -0.5],
        showgrid=False,
    )


def height(n_rows: int) -> int:
    """Return the height in pixels of a figure with a row per model."""
    return 110 + _ROW_PIXELS * n_rows


def strip(i: int, row: int, values: Sequence[float], hover_texts: Sequence[str]) -> list[Any]:
    """Return a row of points, one per value with its hover text, and their quartiles."""
    go = graph_objects()
    colour = COLOURS[i % len(COLOURS)]
    q1, median, q3 = (float(q) for q in np.quantile(np.minimum(values, 1e300), (0.25, 0.5, 0.75)))
    jitter = np.random.default_rng(0).uniform(-0.28, 0.28, len(values))
    box = {"color": colour, "width": 1.5}
    x = [q1, q3, q3, median, median, median, q3, q1, q1]
    y = [-0.34, -0.34, 0.34, 0.34, -0.34, 0.34, 0.34, 0.34, -0.34]
    return [
        go.Scatter(
            x=list(values),
            y=[round(row + float(d), 3) for d in jitter],
            mode="markers",
            marker={"color": colour, "size": 4, "opacity": 0.45},
            hovertext=list(hover_texts),
            hoverinfo="text",
        ),
        go.Scatter(x=x, y=[row + d for d in y], mode="lines", line=box, hoverinfo="skip"),
    ]


def diamond(row: int, label: str, found: Estimate, what: str, write: Any) -> Any:
    """Return the mark of a mean with its interval in a row."""
    bars = _bars(found, "#777")
    return graph_objects().Scatter(
        x=[found.value],
        y=[row],
        error_x=bars,
        mode="markers",
        marker={"symbol": "diamond", "size": 9, "color": "#777", "line": {"width": 1}},
        hovertemplate=f"{html_text(label)}<br>{what} {_with_interval(found, write)}<extra></extra>",
    )


def hover_text(score: SequenceScore) -> str:
    """Return the hover text of a sequence: its place, PPL and first words, escaped."""
    where = f" · {html_text(score.title)}" if score.title else ""
    text = html_text(score.excerpt[:70])
    return f"#{score.index}{where}<br>PPL {ppl(score.ppl)}<br><i>{text}</i>"


# --- ΔNLL: what quantization did to each sequence ---


def delta_nll(report: EvalReport) -> Figure | None:
    """Return ΔNLL of every sequence against the reference, a row per model; None without one."""
    rows = [(i, s, s.against) for i, s in enumerate(report.summaries) if s.against is not None]
    if not rows:
        return None
    fig = figure("ΔNLL (nats per token; right of 0 is worse)", "", height(len(rows)))
    for row, (i, s, against) in enumerate(rows):
        scores = sorted(s.result.sequences, key=lambda x: x.index)
        hover_texts = [
            f"ΔNLL {d:+.4f} nats<br>#{x.index} {html_text(x.title or '')}"
            for d, x in zip(against.delta_nll, scores, strict=True)
        ]
        fig.add_traces(strip(i, row, against.delta_nll, hover_texts))
        mean = _logarithm(against.ppl_ratio)
        fig.add_trace(diamond(row, s.label, mean, "mean ΔNLL", lambda x: f"{x:+.4f}"))
    shown = [d for _, _, against in rows for d in against.delta_nll]
    means = [_logarithm(against.ppl_ratio) for _, _, against in rows]
    low, high = _focus(shown, [x for m in means for x in (m.value, m.low, m.high) if x is not None])
    fig.update_xaxes(range=[low, high])
    for row, (i, s, against) in enumerate(rows):
        fig.add_trace(_beyond(i, row, s, against.delta_nll, low, high))
    fig.add_vline(x=0, line={"dash": "dot", "width": 1, "color": "#777"})
    name_rows(fig, [s.label for _, s, _ in rows])
    return fig


def _logarithm(found: Estimate) -> Estimate:
    if found.low is None or found.high is None:
        return Estimate(math.log(found.value))
    return Estimate(math.log(found.value), math.log(found.low), math.log(found.high))


def _focus(values: Sequence[float], always: Sequence[float]) -> tuple[float, float]:
    """Return a range that shows 0, `always`, and all but the wildest values."""
    q1, median, q3 = np.quantile(values, (0.25, 0.5, 0.75))
    reach = 10 * max(q3 - median, median - q1)
    inside = [0.0, *always, *(v for v in values if abs(v - median) <= reach)]
    margin = 0.06 * (max(inside) - min(inside)) or 0.001
    return min(inside) - margin, max(inside) + margin


def _beyond(i: int, row: int, s: Summary, delta: Sequence[float], low: float, high: float) -> Any:
    """Return a mark at each edge beyond which there are sequences, with their number."""
    scores = sorted(s.result.sequences, key=lambda x: x.index)
    marks = []
    for edge, side, position in ((high, 1, "middle left"), (low, -1, "middle right")):
        pairs = zip(delta, scores, strict=True)
        beyond = [(d, score) for d, score in pairs if side * (d - edge) > 0]
        hover = "<br>".join(f"#{score.index}: ΔNLL {d:+.3f} nats" for d, score in beyond[:12])
        if beyond:
            text = f"{len(beyond)} beyond"
            marks.append((edge - side * 0.012 * (high - low), side, position, text, hover))
    return graph_objects().Scatter(
        x=[m[0] for m in marks],
        y=[row] * len(marks),
        mode="markers+text",
        marker={
            "symbol": ["triangle-right" if m[1] > 0 else "triangle-left" for m in marks],
            "size": 10,
            "color": COLOURS[i % len(COLOURS)],
        },
        textposition=[m[2] for m in marks] or None,
        text=[m[3] for m in marks],
        hovertext=[m[4] for m in marks],
        hoverinfo="text",
    )
