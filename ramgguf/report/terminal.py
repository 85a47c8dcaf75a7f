"""What every command prints with: tables that fit where they go, and statements in a list."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ramgguf.core.escape import printable_lines
from ramgguf.report.grid import Grid, to_rich


class PlainConsole(Console):
    """A console that shows text as it is: names in files are no markup, and control no terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable_lines(text), **options)


def print_grid(console: Console, grid: Grid) -> None:
    """Print the grid; a narrow terminal gets fewer columns, and a line that says so.

    A file or pipe has no width: there the table is as wide as it needs to be.
    """
    full = grid.without_empty_columns()
    shown = full
    if console.is_terminal:
        while _width(console, shown) > console.width and shown.narrower() is not shown:
            shown = shown.narrower()
        console.print(to_rich(shown))
    else:
        _print_whole(console, full)
    left_out = [c.heading for c in full.columns if c not in shown.columns]
    if full.has_details and not shown.has_details:
        left_out.append("intervals")
    if left_out:
        names = Text(", ".join(left_out), style="dim")
        console.print(Text("not shown in this width: ", style="dim") + names)


def _print_whole(console: Console, grid: Grid) -> None:
    width = console.width
    console.width = max(width, _width(console, grid))
    try:
        console.print(to_rich(grid))
    finally:
        console.width = width


def _width(console: Console, grid: Grid) -> int:
    unbounded = console.options.update(max_width=100_000)
    return Measurement.get(console, unbounded, to_rich(grid)).maximum


def print_statements(console: Console, statements: Iterable[str]) -> None:
    """Print each statement as an item of a list; on a terminal, wrapped under itself."""
    items = [Text(printable_lines(s)) for s in statements]
    if not console.is_terminal:
        for item in items:
            console.print(Text("• ") + item, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 1))
    for item in items:
        table.add_row("•", item)
    console.print(table)


def print_captioned(console: Console, grid: Grid, lines: Iterable[str]) -> None:
    """Print the grid, then lines that say how it was measured, each once."""
    print_grid(console, grid)
    for line in dict.fromkeys(lines):
        console.print(Text(printable_lines(line)), soft_wrap=True)
