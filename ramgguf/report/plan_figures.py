"""Figures of plans and measurements: bits by layer and role, rate–distortion curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ramgguf.core.escape import html_text
from ramgguf.gguf.architecture import layer_of
from ramgguf.measure.result import Measurement, TensorMeasurement
from ramgguf.plan.result import Assignment, Plan
from ramgguf.report.figures import Figure, figure, graph_objects

_OUTSIDE = "–"  # the column of tensors that belong to no layer
_MAX_LABELLED = 40  # columns that leave room for a number in each cell
MAX_BPW = 8.5  # what is kept in 16 or 32 bits is shown as this


def bits_by_layer(plan: Plan) -> Figure:
    """Return bits per weight, a row per role and a column per layer; kept tensors are left out."""
    chosen = [a for a in plan.assignments if not is_kept(a)]
    layers = sorted({layer for a in chosen if (layer := layer_of(a.name)) is not None})
    columns = [_OUTSIDE, *map(str, layers)]
    roles = list(dict.fromkeys(a.role for a in chosen))
    cells: dict[tuple[str, str], list[Assignment]] = {}
    for a in chosen:
        layer = layer_of(a.name)
        cells.setdefault((a.role, _OUTSIDE if layer is None else str(layer)), []).append(a)
    filled = [
        (role, i, found)
        for role in roles
        for i, column in enumerate(columns)
        if (found := cells.get((role, column)))
    ]
    labelled = len(columns) <= _MAX_LABELLED
    fig = figure("layer", "", 110 + 26 * len(roles))
    fig.add_trace(
        graph_objects().Bar(  # the slim plotly has no heatmap: a cell is a bar with a base
            orientation="h",
            x=[1] * len(filled),
            base=[column - 0.5 for _, column, _ in filled],
            y=[html_text(role) for role, _, _ in filled],
            text=[f"{bpw(found):.1f}" if labelled else "" for _, _, found in filled],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            textfont={"size": 10},
            hovertext=["<br>".join(_told(a) for a in found) for _, _, found in filled],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={
                "color": [bpw(found) for _, _, found in filled],
                "colorscale": "Cividis",
                "cmin": 2,
                "cmax": MAX_BPW,
                "showscale": True,
                "colorbar": {
                    "title": {"text": "bits per weight", "side": "right"},
                    "thickness": 12,
                },
            },
        )
    )
    fig.update_layout(barmode="overlay", bargap=0.06)
    shown = range(0, len(columns), max(1, len(columns) // 20))
    fig.update_xaxes(
        tickvals=list(shown),
        ticktext=[columns[i] for i in shown],
        range=[-0.5, len(columns) - 0.5],
        showgrid=False,
    )
    fig.update_yaxes(type="category", autorange="reversed", showgrid=False)
    return fig


def is_kept(a: Assignment) -> bool:
    """Return whether the plan leaves the tensor as it is for another reason than a pin."""
    return a.note is not None and not a.note.startswith("pinned")


def bpw(assignments: Sequence[Assignment]) -> float:
    """Return the bits per weight of the tensors together."""
    return 8 * sum(a.n_bytes for a in assignments) / sum(a.n_weights for a in assignments)


def _told(a: Assignment) -> str:
    return f"{html_text(a.name)}<br>{html_text(a.format)}, {bpw([a]):.2f} bpw, NMSE {a.nmse:.2e}"


@dataclass(frozen=True)
class Curve:
    """A tensor's rate–distortion curve for the page: points as (format, bits per weight, NMSE).

    chosen: which format each plan gives it, as (plan's label, format).
    """

    name: str
    role: str
    shape: str
    points: tuple[tuple[str, float, float], ...]
    chosen: tuple[tuple[str, str], ...]


def curves(measurement: Measurement, plans: Sequence[tuple[str, Plan]]) -> list[dict[str, object]]:
    """Return the curves of all tensors that have a choice, the largest first, as JSON values."""
    given = [(label, {a.name: a.format for a in plan.assignments}) for label, plan in plans]
    found = [
        Curve(
            name=t.name,
            role=t.role,
            shape=" × ".join(f"{n:,}" for n in t.shape),
            points=_points(t),
            chosen=tuple((label, formats[t.name]) for label, formats in given if t.name in formats),
        )
        for t in sorted(measurement.tensors, key=lambda t: -t.n_weights)
        if t.kept is None and len(t.points) > 1
    ]
    return [asdict(curve) for curve in found]


def _points(t: TensorMeasurement) -> tuple[tuple[str, float, float], ...]:
    """Return the lossy points; a lossless one has no place on a logarithmic axis."""
    return tuple(
        (p.format, round(8 * p.n_bytes / t.n_weights, 4), float(f"{p.nmse:.4g}"))
        for p in t.points
        if p.nmse > 0
    )
