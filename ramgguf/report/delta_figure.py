"""The figure of ΔNLL: what quantization did to each sequence."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ramgguf.core.escape import html_text
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.summary import Summary
from ramgguf.report.figures import (
    COLOURS,
    Figure,
    diamond,
    figure,
    graph_objects,
    height,
    name_rows,
    strip,
)


def delta_nll(report: EvalReport) -> Figure | None:
    """Return ΔNLL of every sequence against the reference, a row per model; None without one."""
    rows = [(i, s, s.against) for i, s in enumerate(report.summaries) if s.against is not None]
    if not rows:
        return None
    fig = figure("ΔNLL (nats per token; right of 0 is worse)", "", height(len(rows)))
    for row, (i, s, against) in enumerate(rows):
        scores = sorted(s.result.sequences, key=lambda x: x.index)
        told = [
            f"ΔNLL {d:+.4f} nats<br>#{x.index} {html_text(x.title or '')}"
            for d, x in zip(against.delta_nll, scores, strict=True)
        ]
        fig.add_traces(strip(i, row, against.delta_nll, told))
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
        told = "<br>".join(f"#{score.index}: ΔNLL {d:+.3f} nats" for d, score in beyond[:12])
        if beyond:
            text = f"{len(beyond)} beyond"
            marks.append((edge - side * 0.012 * (high - low), side, position, text, told))
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
