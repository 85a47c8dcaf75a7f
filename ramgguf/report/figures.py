"""Figures of evaluations, drawn with plotly; the page gives them the colours of its theme."""

import html
import math
from collections.abc import Sequence
from typing import Any

from ramgguf.core.errors import RamggufError
from ramgguf.evaluate.bootstrap import Estimate
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.result import SequenceScore
from ramgguf.gguf.identity import difference
from ramgguf.report.numbers import kld, ppl

Figure = Any  # plotly.graph_objects.Figure: plotly is an optional package without types

# at least 3.6 : 1 against white and against the dark background, told apart by the colour-blind
COLOURS = ("#3b82c4", "#c8641e", "#1b8a6b", "#a8559c", "#94791a", "#7a6fd6", "#c94c5c", "#5f7387")
# plotly's names, and the characters that look like them
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "pentagon")
SIGNS = "●■◆▲✚★⬢⬟"
_ROW_PIXELS = 64  # height of a model's row where models are stacked
_GB = 1e9


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
    margin = 0.05 * (high - low) + 0.02
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


def ppl_by_size(study: EvalReport) -> Figure:
    """Return corpus PPL (filled) and median PPL (open) against file size, with intervals."""
    go = graph_objects()
    fig = figure("file size (GB)", "perplexity", 420)
    sizes = [s.result.model.n_bytes / _GB for s in study.summaries]
    nudge = 0.006 * ((max(sizes) - min(sizes)) or max(sizes))
    for i, s in enumerate(study.summaries):
        for name, symbol, shift in (("corpus_ppl", "", -nudge), ("median_ppl", "-open", nudge)):
            found, mark = s.estimates[name], style(i)
            label = html.escape(s.label)
            what = "corpus" if name == "corpus_ppl" else "median"
            fig.add_trace(
                go.Scatter(
                    x=[sizes[i] + shift],
                    y=[found.value],
                    error_y=_bars(found, mark["color"]),
                    mode="markers",
                    marker={**mark, "symbol": mark["symbol"] + symbol, "size": 10},
                    hovertemplate=f"{label}<br>{what} PPL {_told(found, ppl)}<br>"
                    f"{sizes[i]:.3f} GB<extra></extra>",
                )
            )
    for label, value in _references_elsewhere(study):
        fig.add_hline(
            y=value,
            line={"dash": "dot", "width": 1, "color": "#777"},
            annotation={"text": f"{html.escape(label)}, corpus PPL {ppl(value)}", "font_size": 11},
        )
    return fig


def _references_elsewhere(study: EvalReport) -> list[tuple[str, float]]:
    """Return the references that are not among the models themselves, with their corpus PPL."""
    known = [s.result.model for s in study.summaries]
    found = {
        s.against.label: s.against.reference_corpus_ppl
        for s in study.summaries
        if s.against
        and (reference := s.result.reference)
        and all(difference(reference, model) is not None for model in known)
    }
    return list(found.items())


def kld_by_size(study: EvalReport) -> Figure | None:
    """Return mean KLD against file size on a logarithmic axis; None without a reference."""
    go = graph_objects()
    fig = figure("file size (GB)", "mean KLD (nats per token)", 420)
    for i, s in enumerate(study.summaries):
        if s.against is None or s.against.divergences["mean_kld"].value <= 0:
            continue
        found, mark, size = s.against.divergences["mean_kld"], style(i), s.result.model.n_bytes
        label = html.escape(s.label)
        fig.add_trace(
            go.Scatter(
                x=[size / _GB],
                y=[found.value],
                error_y=_bars(found, mark["color"]),
                mode="markers",
                marker={**mark, "size": 10},
                hovertemplate=f"{label}<br>mean KLD {_told(found, kld)}<br>"
                f"{size / _GB:.3f} GB<extra></extra>",
            )
        )
    klds = [s.against.divergences["mean_kld"] for s in study.summaries if s.against is not None]
    bounds = [x for e in klds for x in (e.value, e.low, e.high)]
    shown = [x for x in bounds if x is not None and x > 0]
    if not fig.data:
        return None
    logarithmic("y", fig, shown)
    return fig


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


def _told(found: Estimate, write: Any) -> str:
    if found.low is None or found.high is None:
        return str(write(found.value))
    return f"{write(found.value)} (95 %: {write(found.low)} to {write(found.high)})"


def ppl_distribution(study: EvalReport) -> Figure:
    """Return every sequence's PPL, a row per model; outliers are named, corpus PPL is marked."""
    go = graph_objects()
    fig = figure("sequence perplexity (logarithmic)", "", height(len(study.summaries)))
    for i, s in enumerate(study.summaries):
        scores = s.result.sequences
        fig.add_trace(strip(i, s.label, [x.ppl for x in scores], [told_score(x) for x in scores]))
        fig.add_trace(diamond(s.label, s.estimates["corpus_ppl"], "corpus PPL", ppl))
        if s.outliers:
            named = [f"#{x.index}" if k < 5 else "" for k, x in enumerate(s.outliers)]
            fig.add_trace(
                go.Scatter(
                    x=[x.ppl for x in s.outliers],
                    y=[html.escape(s.label)] * len(s.outliers),
                    mode="markers+text",
                    text=named,
                    textposition="top center",
                    marker={"color": COLOURS[i % len(COLOURS)], "symbol": "x", "size": 9},
                    hovertext=[told_score(x) for x in s.outliers],
                    hoverinfo="text",
                )
            )
    fig.add_vline(x=study.outlier_ppl, line={"dash": "dot", "width": 1, "color": "#777"})
    logarithmic("x", fig, [x.ppl for s in study.summaries for x in s.result.sequences])
    fig.update_yaxes(autorange="reversed")
    return fig


def height(n_rows: int) -> int:
    """Return the height in pixels of a figure with a row per model."""
    return 110 + _ROW_PIXELS * n_rows


def strip(i: int, label: str, values: Sequence[float], told: Sequence[str]) -> Any:
    """Return a row of points, one per value with its hover text, over their quartiles."""
    colour = COLOURS[i % len(COLOURS)]
    return graph_objects().Box(
        x=list(values),
        y=[html.escape(label)] * len(values),
        orientation="h",
        boxpoints="all",
        jitter=0.6,
        pointpos=0,
        fillcolor="rgba(0,0,0,0)",
        line={"color": colour, "width": 1.2},
        marker={"color": colour, "size": 4, "opacity": 0.45},
        hovertext=list(told),
        hoverinfo="text",
        hoveron="points",
    )


def diamond(label: str, found: Estimate, what: str, write: Any) -> Any:
    """Return the mark of a mean with its interval in the row of this label."""
    bars = _bars(found, "#777")
    return graph_objects().Scatter(
        x=[found.value],
        y=[html.escape(label)],
        error_x=bars,
        mode="markers",
        marker={"symbol": "diamond", "size": 9, "color": "#777", "line": {"width": 1}},
        hovertemplate=f"{html.escape(label)}<br>{what} {_told(found, write)}<extra></extra>",
    )


def told_score(score: SequenceScore) -> str:
    """Return the hover text of a sequence: its place, PPL and first words, escaped."""
    where = f" · {html.escape(score.title)}" if score.title else ""
    text = html.escape(score.excerpt[:160])
    lines = "<br>".join(text[k : k + 80] for k in range(0, len(text), 80))
    return f"#{score.index}{where}<br>PPL {ppl(score.ppl)}<br><i>{lines}</i>"
