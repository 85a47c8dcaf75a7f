"""The frontier for the terminal, and as a picture (SVG, drawn here: no package needed)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from rich.console import Console
from rich.table import Table

from ramgguf.curves import Frontier
from ramgguf.schema import Plan
from ramgguf.units import format_bytes

BPW_STEP = 0.25


@dataclass(frozen=True)
class Row:
    """A size of the table: cost of its plan, and why it is there."""

    n_bytes: int
    cost: float
    mark: str = ""


def rows(frontier: Frontier, plans: Sequence[Plan] = ()) -> list[Row]:
    """Return start, a step about every quarter of a bpw, knees, end and the plans asked for."""
    found = {frontier.start_bytes: Row(frontier.start_bytes, frontier.start_cost, "smallest")}
    following = math.floor(frontier.bpw(frontier.start_bytes) / BPW_STEP) + 1
    for i, step in enumerate(frontier.steps):
        due = frontier.bpw(step.n_bytes) >= following * BPW_STEP
        if due:
            following = math.floor(frontier.bpw(step.n_bytes) / BPW_STEP) + 1
        if due or i in frontier.knees or i == len(frontier.steps) - 1:
            mark = "knee" if i in frontier.knees else ""
            found[step.n_bytes] = Row(step.n_bytes, step.cost, mark)
    for plan in plans:
        mark = f"asked for, within {plan.gap:.1g} of the optimum" if plan.gap else "asked for"
        found[plan.n_bytes] = Row(plan.n_bytes, plan.total_cost, mark)
    return [found[n] for n in sorted(found)]


def curve_table(frontier: Frontier, plans: Sequence[Plan] = ()) -> Table:
    """Return sizes, bpw, cost, and what 1 % more bytes would lower the cost by at each size."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("size", "bytes", "bpw", frontier.objective, "next 1 %"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows(frontier, plans):
        later = cost_at(frontier, round(row.n_bytes * 1.01))
        saved = 1 - later / row.cost if row.cost > 0 and later is not None else None
        table.add_row(
            format_bytes(row.n_bytes),
            f"{row.n_bytes:,}",
            f"{frontier.bpw(row.n_bytes):.3f}",
            f"{row.cost:.4g}",
            "–" if saved is None else f"−{saved:.1%}",
            row.mark,
        )
    return table


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


def print_curve(frontier: Frontier, plans: Sequence[Plan], console: Console) -> None:
    """Print the frontier's table and notes."""
    console.print(curve_table(frontier, plans))
    console.print(
        f"{len(frontier.steps) + 1} optimal plans of {len(frontier.tensors)} tensors, "
        f"{frontier.bpw(frontier.start_bytes):.2f} to {frontier.bpw(frontier.end_bytes):.2f} bpw"
    )
    for note in frontier.notes:
        console.print(f"note: {note}")


WIDTH, HEIGHT = 800, 480
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 40, 50


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
    """Return the picture: cost over size, knees as rings, the plans asked for as dots."""
    points = [(frontier.start_bytes, frontier.start_cost)]
    points += [(s.n_bytes, s.cost) for s in frontier.steps]
    points = [(n, cost) for n, cost in points if cost > 0]
    costs = [cost for _, cost in points] or [1.0]
    axes = _Axes(
        frontier.start_bytes,
        frontier.end_bytes,
        math.floor(math.log10(min(costs))),
        math.floor(math.log10(max(costs))) + 1,
    )
    path = " ".join(f"{axes.x(n):.1f},{axes.y(cost):.1f}" for n, cost in points)
    title = f"{frontier.source.name or frontier.source.path}: {frontier.objective}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
            '<g font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
            *_grid(frontier, axes),
            f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
            *_marks(frontier, plans, axes),
            "</g></svg>\n",
        ]
    )


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
