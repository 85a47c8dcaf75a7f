"""The frontier for the terminal, and as a picture (SVG, drawn here: no package needed)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console

from ramgguf.core.units import format_bytes
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.predictions import Prediction, predict
from ramgguf.plan.result import Plan
from ramgguf.report.grid import Column, Grid, to_rich

BPW_STEP = 0.25


@dataclass(frozen=True)
class Row:
    """A size of the table: cost of its plan, what is expected of it, and why it is there."""

    n_bytes: int
    cost: float
    predicted: Prediction | None
    mark: str = ""


def rows(frontier: Frontier, plans: Sequence[Plan] = ()) -> list[Row]:
    """Return start, a step about every quarter of a bpw, knees, end and the plans asked for."""
    start, start_cost = frontier.start_bytes, frontier.start_cost
    found = {start: Row(start, start_cost, _expected(frontier, 0), "smallest")}
    following = math.floor(frontier.bpw(start) / BPW_STEP) + 1
    for i, step in enumerate(frontier.steps):
        due = frontier.bpw(step.n_bytes) >= following * BPW_STEP
        if due:
            following = math.floor(frontier.bpw(step.n_bytes) / BPW_STEP) + 1
        if due or i in frontier.knees or i == len(frontier.steps) - 1:
            mark = "knee" if i in frontier.knees else ""
            found[step.n_bytes] = Row(step.n_bytes, step.cost, _expected(frontier, i + 1), mark)
    for plan in plans:
        expected = predict(plan.objective, plan.total_cost, plan.total_cost_error)
        found[plan.n_bytes] = Row(plan.n_bytes, plan.total_cost, expected, "asked for")
    return [found[n] for n in sorted(found)]


def _expected(frontier: Frontier, index: int) -> Prediction | None:
    return frontier.predictions[index] if frontier.predictions else None


def curve_grid(frontier: Frontier, plans: Sequence[Plan] = ()) -> Grid:
    """Return sizes, bpw, what is expected, and what 1 % more bytes would lower the cost by."""
    predicted = ("KLD", "95 %", "PPL ×", "95 %") if frontier.predictions else (frontier.objective,)
    headings = ("size", "bpw", *predicted, "next 1 %")
    table = []
    for row in rows(frontier, plans):
        later = cost_at(frontier, round(row.n_bytes * 1.01))
        saved = 1 - later / row.cost if row.cost > 0 and later is not None else None
        table.append(
            (
                format_bytes(row.n_bytes),
                f"{frontier.bpw(row.n_bytes):.3f}",
                *_told(row),
                "–" if saved is None else f"−{saved:.1%}",
                row.mark,
            )
        )
    return Grid("", (*map(Column, headings), Column("", number=False)), tuple(table))


def _told(row: Row) -> tuple[str, ...]:
    p = row.predicted
    if p is None:
        return (f"{row.cost:.4g}",)
    return (
        f"{p.kld:.3g}",
        f"{p.kld_low:.2g}–{p.kld_high:.2g}",
        f"{p.ppl_ratio:.3f}",
        f"{p.ppl_ratio_low:.3g}–{p.ppl_ratio_high:.3g}",
    )


def cost_at(frontier: Frontier, n_bytes: int) -> float | None:
    """Return the bound of the cost at a size, between steps in a line; None beyond the ends."""
    before, cost = frontier.start_bytes, frontier.start_cost
    if n_bytes < before:
        return None
    for step in frontier.steps:
        if step.n_bytes >= n_bytes:
            share = (n_bytes - before) / (step.n_bytes - before)
            return cost + share * (step.cost - cost)
        before, cost = step.n_bytes, step.cost
    return cost if n_bytes == before else None


def remarks(frontier: Frontier, plans: Sequence[Plan] = ()) -> list[str]:
    """Return how many plans there are, how near the optimum those asked for, and the notes."""
    ends = f"{frontier.bpw(frontier.start_bytes):.2f} to {frontier.bpw(frontier.end_bytes):.2f} bpw"
    told = [f"{len(frontier.steps) + 1} optimal plans of {len(frontier.tensors)} tensors, {ends}"]
    for plan in plans:
        gap = f"within {plan.gap:.1g} of the optimum" if plan.gap else "the optimum"
        told.append(f"asked for {plan.budget:,} bytes: {plan.n_bytes:,}, proven {gap}")
    if frontier.predicted_from is not None:
        told.append(f"predicted from {frontier.predicted_from}")
    return told + [f"note: {note}" for note in frontier.notes]


def print_curve(frontier: Frontier, plans: Sequence[Plan], console: Console) -> None:
    """Print the frontier's table and notes."""
    console.print(to_rich(curve_grid(frontier, plans), header_style="bold"))
    for line in remarks(frontier, plans):
        console.print(line, soft_wrap=True, markup=False)


WIDTH, HEIGHT = 800, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 40, 50
LINE = 'fill="none" stroke="#1f5fa8" stroke-width="2"'


@dataclass(frozen=True)
class _Axes:
    """Maps bytes and the cost's decimal logarithm to pixels."""

    low_bytes: int
    high_bytes: int
    low: float
    high: float

    def x(self, n_bytes: float) -> float:
        share = (n_bytes - self.low_bytes) / max(1, self.high_bytes - self.low_bytes)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, cost: float) -> float:
        share = (math.log10(cost) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def curve_svg(frontier: Frontier, plans: Sequence[Plan] = ()) -> str:
    """Return the picture: predicted KLD over size in its band (without prediction, the cost).

    Knees are rings, the plans asked for dots.
    """
    points = _points(frontier)
    band = [b for b in _band(frontier) if b[1] > 0]
    costs = [cost for _, cost in [*points, *band]] or [1.0]
    axes = _Axes(
        frontier.start_bytes,
        frontier.end_bytes,
        math.floor(math.log10(min(costs))),
        math.floor(math.log10(max(costs))) + 1,
    )
    what = "predicted KLD, nats per token, with 95 %" if band else frontier.objective
    title = f"{frontier.source.name or frontier.source.path}: {what}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            '<g font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
            *_grid(frontier, axes),
            f'<polygon points="{_path(axes, band)}" fill="#1f5fa8" opacity="0.15"/>',
            f'<polyline points="{_path(axes, points)}" {LINE}/>',
            *_marks(frontier, plans, axes),
            "</g></svg>\n",
        ]
    )


def _points(frontier: Frontier) -> list[tuple[int, float]]:
    """Return size and height of the start and every step."""
    sizes = [frontier.start_bytes, *(s.n_bytes for s in frontier.steps)]
    heights = [frontier.start_cost, *(s.cost for s in frontier.steps)]
    if frontier.predictions:
        heights = [p.kld for p in frontier.predictions]
    return [(n, height) for n, height in zip(sizes, heights, strict=True) if height > 0]


def _band(frontier: Frontier) -> list[tuple[int, float]]:
    """Return the outline of the interval: along its upper end, and back along the lower one."""
    sizes = [frontier.start_bytes, *(s.n_bytes for s in frontier.steps)]
    pairs = list(zip(sizes, frontier.predictions, strict=False))
    upper = [(n, p.kld_high) for n, p in pairs]
    return upper + [(n, max(p.kld_low, p.kld / 10)) for n, p in reversed(pairs)]


def _path(axes: _Axes, points: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{axes.x(n):.1f},{axes.y(height):.1f}" for n, height in points)


def _grid(frontier: Frontier, axes: _Axes) -> Iterator[str]:
    for exponent in range(int(axes.low), int(axes.high) + 1):
        y = axes.y(10.0**exponent)
        yield _line(LEFT, y, WIDTH - RIGHT, y)
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{exponent}</text>'
    for k in range(6):
        n_bytes = axes.low_bytes + k * (axes.high_bytes - axes.low_bytes) / 5
        x = axes.x(n_bytes)
        yield _line(x, TOP, x, HEIGHT - BOTTOM)
        label = f"{format_bytes(n_bytes)} · {frontier.bpw(round(n_bytes)):.2f} bpw"
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _marks(frontier: Frontier, plans: Sequence[Plan], axes: _Axes) -> Iterator[str]:
    for k in frontier.knees:
        step, height = frontier.steps[k], frontier.steps[k].cost
        if frontier.predictions:
            height = frontier.predictions[k + 1].kld
        yield _circle(axes, step.n_bytes, height, 'r="6" fill="none" stroke="#c0392b"', "knee")
    for plan in plans:
        if plan.total_cost > 0 and plan.n_bytes <= axes.high_bytes:
            expected = predict(plan.objective, plan.total_cost, plan.total_cost_error)
            height = plan.total_cost if expected is None else expected.kld
            yield _circle(axes, plan.n_bytes, height, 'r="4" fill="#1f5fa8"', "plan")


def _circle(axes: _Axes, n_bytes: int, cost: float, style: str, what: str) -> str:
    return (
        f'<circle cx="{axes.x(n_bytes):.1f}" cy="{axes.y(cost):.1f}" {style}>'
        f"<title>{what}: {format_bytes(n_bytes)}, {cost:.4g}</title></circle>"
    )
