"""A table as a value, rendered for terminals (rich), markdown and HTML alike."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.table import Table
from rich.text import Text

from ramgguf.core.escape import html_text, markdown_text, printable

T = TypeVar("T")
DETAILS_RANK = 2  # columns of a higher rank go before the intervals do, the others after


@dataclass(frozen=True)
class Column:
    """A column's heading. Columns of the largest rank are the first to go when room is short."""

    heading: str
    rank: int = 0
    number: bool = True


@dataclass(frozen=True)
class Field(Generic[T]):
    """A column and what it shows of an item: heading and cell cannot part."""

    heading: str
    cell: Callable[[T], str]
    rank: int = 0
    number: bool = True


def grid_of(title: str, fields: Sequence[Field[T]], items: Iterable[T]) -> "Grid":
    """Return a row per item with a cell per field."""
    columns = tuple(Column(f.heading, f.rank, f.number) for f in fields)
    return Grid(title, columns, tuple(tuple(f.cell(item) for f in fields) for item in items))


@dataclass(frozen=True)
class Grid:
    """Cells as text, row by row; every row has a cell per column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]

    def without_empty_columns(self) -> "Grid":
        """Return the grid without columns that have nothing in any row."""
        return self._only([i for i in range(len(self.columns)) if any(r[i] for r in self.rows)])

    def without(self, heading: str) -> "Grid":
        """Return the grid without the column of this heading."""
        return self._only([i for i, c in enumerate(self.columns) if c.heading != heading])

    def narrower(self) -> "Grid":
        """Return the grid a step narrower; itself where nothing may go.

        Columns above DETAILS_RANK go first, the largest rank first, then all intervals, then the
        other columns above rank 0.
        """
        most = max(c.rank for c in self.columns)
        if most <= DETAILS_RANK and self.has_details:
            return self.without_details()
        if most == 0:
            return self
        last = max(i for i, c in enumerate(self.columns) if c.rank == most)
        return self._only([i for i in range(len(self.columns)) if i != last])

    @property
    def has_details(self) -> bool:
        """Whether a number has its interval beside it, in parentheses."""
        return any(
            c.number and " (" in row[i] for i, c in enumerate(self.columns) for row in self.rows
        )

    def without_details(self) -> "Grid":
        """Return the grid without what stands in parentheses behind numbers."""
        rows = tuple(
            tuple(
                cell.partition(" (")[0] if c.number else cell
                for c, cell in zip(self.columns, row, strict=True)
            )
            for row in self.rows
        )
        return Grid(self.title, self.columns, rows)

    def _only(self, kept: list[int]) -> "Grid":
        columns = tuple(self.columns[i] for i in kept)
        return Grid(self.title, columns, tuple(tuple(row[i] for i in kept) for row in self.rows))


def to_rich(grid: Grid, *, header_style: str = "dim") -> Table:
    """Return the grid for a terminal: no borders, numbers to the right."""
    table = Table(
        title=grid.title or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        header_style=header_style,
    )
    for column in grid.columns:
        table.add_column(
            Text(column.heading),
            justify="right" if column.number else "left",
            no_wrap=column.number,
            overflow="fold",
        )
    for row in grid.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def to_markdown(grid: Grid) -> str:
    """Return the grid as a GitHub-flavoured markdown table."""
    lines = [
        _markdown_row(c.heading for c in grid.columns),
        "|" + "|".join("---:" if c.number else "---" for c in grid.columns) + "|",
        *(_markdown_row(row) for row in grid.rows),
    ]
    return "\n".join(lines) + "\n"


def captioned_markdown(grid: Grid, lines: Iterable[str]) -> str:
    """Return the grid under its title, with lines that say how it was measured, each once."""
    said = " ".join(markdown_text(line) for line in dict.fromkeys(lines))
    return f"**{grid.title}**\n\n{to_markdown(grid)}\n{said}\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def to_html(grid: Grid) -> str:
    """Return the grid as an HTML table; all text is escaped."""
    head = "".join(
        f'<th scope="col"{_css(column)}>{html_text(column.heading)}</th>' for column in grid.columns
    )
    body = "".join(f"<tr>{_html_row(grid, row)}</tr>\n" for row in grid.rows)
    caption = f"<caption>{html_text(grid.title)}</caption>" if grid.title else ""
    return (
        f'<div class="scroll"><table>{caption}\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n"
    )


def _html_row(grid: Grid, row: tuple[str, ...]) -> str:
    return "".join(
        f"<td{_css(column)}>{_html_cell(cell) if column.number else html_text(cell)}</td>"
        for column, cell in zip(grid.columns, row, strict=True)
    )


def _css(column: Column) -> str:
    return ' class="number"' if column.number else ""


def _html_cell(text: str) -> str:
    """Return the cell with what stands in parentheses, the interval, small on a second line."""
    value, parenthesis, rest = html_text(text).partition(" (")
    return f"{value}<br><small>{rest.removesuffix(')')}</small>" if parenthesis else value
