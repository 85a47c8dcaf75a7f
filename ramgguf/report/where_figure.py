"""KLD by position in the window, drawn."""

import html

from ramgguf.core.units import format_count
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.result import FIRST_TOKENS
from ramgguf.evaluate.token_groups import by_position
from ramgguf.report.figures import Figure, figure, graph_objects, logarithmic, style
from ramgguf.report.numbers import kld, percent
from ramgguf.report.where import against_reference


def kld_by_position(report: EvalReport) -> Figure | None:
    """Return a line per model, a point per group of positions; None where none is known.

    A position p stands at p + 1: the axis is logarithmic.
    """
    go = graph_objects()
    fig = figure("position in the window + 1 (logarithmic)", "mean KLD (nats per token)", 420)
    labels = [s.label for s in report.summaries]
    xs: list[float] = []
    ys: list[float] = []
    for s, _ in against_reference(report):
        groups = [g for g in by_position(s.result) if g.kld > 0]
        if not groups:
            continue
        # the middle of the group, on the axis
        starts = [int(g.label.split("–")[0]) for g in groups]
        x = [p + 1.0 if p < 2 else 1.5 * p + 0.5 for p in starts]
        xs, ys = xs + x, ys + [g.kld for g in groups]
        mark = style(labels.index(s.label))
        fig.add_trace(
            go.Scatter(
                x=x,
                y=[g.kld for g in groups],
                mode="lines+markers",
                name=html.escape(s.label),
                marker={**mark, "size": 8},
                line={"width": 1.5, "color": mark["color"]},
                hovertext=[
                    f"{html.escape(s.label)}<br>positions {g.label}: KLD {kld(g.kld)}, "
                    f"{100 * g.share:.1f} % of all<br>same top {percent(g.same_top_p)}, "
                    f"{format_count(g.n, 'token', ',')}"
                    for g in groups
                ],
                hoverinfo="text",
            )
        )
    if not xs:
        return None
    fig.add_vline(x=FIRST_TOKENS + 0.5, line={"dash": "dot", "width": 1, "color": "#777"})
    logarithmic("x", fig, xs)
    logarithmic("y", fig, ys)
    fig.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12, "x": 0})
    return fig
