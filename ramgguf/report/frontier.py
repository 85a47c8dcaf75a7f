"""The frontier for the terminal, and as a picture (SVG, drawn here: no package needed)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console

from ramgguf.core.escape import html_text
from ramgguf.core.units import format_bytes, format_count
from ramgguf.plan.frontier_result import Frontier, ends_before
from ramgguf.plan.result import Plan
from ramgguf.report.grid import Field, Grid, grid_of, to_rich

BPW_STEP = 0.25


@dataclass(frozen=True)
class Row:
    """A size of the table: cost of its plan, and why it is there."""

    n_bytes: int
    cost: float
    mark: str = ""


def rows(frontier: Frontier, plans: Sequence[Plan] = ()) -> list[Row]:
    """Return start, a step about every quarter of a bpw, knees, end and the plans asked for."""
    start, start_cost = frontier.start_bytes, frontier.start_cost
    found = {start: Row(start, start_cost, "smallest")}
    following = math.floor(frontier.bpw(start) / BPW_STEP) + 1
    for i, step in enumerate(frontier.steps):
        due = frontier.bpw(step.n_bytes) >= following * BPW_STEP
        if due:
            following = math.floor(frontier.bpw(step.n_bytes) / BPW_STEP) + 1
        if due or i in frontier.knees or i == len(frontier.steps) - 1:
            mark = "knee" if i in frontier.knees else ""
            found[step.n_bytes] = Row(step.n_bytes, step.cost, mark)
    for plan in plans:
        found[plan.n_bytes] = Row(plan.n_bytes, plan.total_cost, "asked for")
    return [found[n] for n in sorted(found)]


def curve_grid(frontier: Frontier, plans: Sequence[Plan] = ()) -> Grid:
    """Return sizes, bpw, the objective, and what 1 % more bytes would lower it by."""

    def next_percent(row: Row) -> str:
        later = cost_at(frontier, round(row.n_bytes * 1.01))
        return f"−{1 - later / row.cost:.1%}" if row.cost > 0 and later is not None else "–"

    fields: list[Field[Row]] = [
        Field("size", lambda r: format_bytes(r.n_bytes)),
        Field("bpw", lambda r: f"{frontier.bpw(r.n_bytes):.3f}"),
        Field(frontier.objective, lambda r: f"{r.cost:.4g}"),
        Field("next 1 %", next_percent),
        Field("", lambda r: r.mark, number=False),
    ]
    return grid_of("", fields, rows(frontier, plans))


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
    plans_found = format_count(len(frontier.steps) + 1, "optimal plan")
    lines = [f"{plans_found} of {format_count(len(frontier.tensors), 'tensor')}, {ends}"]
    for plan in plans:
        if ends_before(frontier, plan.budget):
            lines.append(
                f"asked for {plan.budget:,} bytes: the curve ends at {plan.n_bytes:,}; "
                "`ramgguf plan` makes larger plans"
            )
            continue
        gap = f"within {plan.gap:.1g} of the optimum" if plan.gap else "the optimum"
        lines.append(f"asked for {plan.budget:,} bytes: {plan.n_bytes:,}, proven {gap}")
    return lines + [f"note: {note}" for note in frontier.notes]


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
    """Return the picture: the objective over size.

    Knees are rings, the plans asked for dots.
    """
    points = _points(frontier)
    costs = [cost for _, cost in points] or [1.0]
    axes = _Axes(
        frontier.start_bytes,
        frontier.end_bytes,
        math.floor(math.log10(min(costs))),
        math.floor(math.log10(max(costs))) + 1,
    )
    title = f"{frontier.source.name or frontier.source.path}: {frontier.objective}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            '<g font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="22" font-size="15">{html_text(title)}</text>',
            *_grid(frontier, axes),
            f'<polyline points="{_path(axes, points)}" {LINE}/>',
            *_marks(frontier, plans, axes),
            "</g></svg>\n",
        ]
    )


def _points(frontier: Frontier) -> list[tuple[int, float]]:
    """Return size and height of the start and every step."""
    sizes = [frontier.start_bytes, *(s.n_bytes for s in frontier.steps)]
    heights = [frontier.start_cost, *(s.cost for s in frontier.steps)]
    return [(n, height) for n, height in zip(sizes, heights, strict=True) if height > 0]


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
        step = frontier.steps[k]
        yield _circle(axes, step.n_bytes, step.cost, 'r="6" fill="none" stroke="#c0392b"', "knee")
    for plan in plans:
        if plan.total_cost > 0 and plan.n_bytes <= axes.high_bytes:
            yield _circle(axes, plan.n_bytes, plan.total_cost, 'r="4" fill="#1f5fa8"', "plan")


def _circle(axes: _Axes, n_bytes: int, cost: float, style: str, what: str) -> str:
    return (
        f'<circle cx="{axes.x(n_bytes):.1f}" cy="{axes.y(cost):.1f}" {style}>'
        f"<title>{what}: {format_bytes(n_bytes)}, {cost:.4g}</title></circle>"
    )
