"""A leaderboard of published figures, which have no sequences to summarize."""

import csv
import io
from collections.abc import Callable

from rich.console import Console

from ramgguf.core.escape import markdown_text, printable, to_json
from ramgguf.core.units import format_bytes
from ramgguf.evaluate.leaderboard import CRITERIA, LABELS, Leaderboard, Row
from ramgguf.report.chart import board_chart
from ramgguf.report.evaluation import ranking_grid
from ramgguf.report.grid import Field, Grid, grid_of, to_markdown
from ramgguf.report.numbers import kld, ppl, with_interval
from ramgguf.report.sentences import findings
from ramgguf.report.terminal import print_grid, print_statements
from ramgguf.report.verdict import board_verdict


def board_grid(board: Leaderboard) -> Grid:
    """Return a row per model: size and what is known of each criterion."""

    def value(criterion: str) -> Callable[[Row], str]:
        write = kld if criterion == "mean_kld" else ppl
        return lambda r: (
            with_interval(r.estimates[criterion], write) if criterion in r.estimates else ""
        )

    fields: list[Field[Row]] = [
        Field("model", lambda r: r.label, number=False),
        Field("size", lambda r: "" if r.n_bytes is None else format_bytes(r.n_bytes)),
        *(Field(LABELS[c], value(c)) for c in CRITERIA),
        Field("outliers", lambda r: "" if r.n_outliers is None else str(r.n_outliers)),
    ]
    return grid_of("Published figures", fields, board.rows)


def board_grids(board: Leaderboard) -> list[Grid]:
    """Return the table, and the rankings where two models have a figure of one kind."""
    grids = (board_grid(board), ranking_grid(board))
    return [grid.without_empty_columns() for grid in grids if grid.rows]


def print_board(board: Leaderboard, console: Console) -> None:
    """Print the verdict, a chart, the table, the rankings and the findings."""
    for line in board_verdict(board):
        console.print(line, soft_wrap=not console.is_terminal)
    if drawn := board_chart(board, min(console.width, 100) if console.is_terminal else 80):
        console.print()
        console.print("\n".join(drawn), soft_wrap=True)
    console.print()
    for grid in board_grids(board):
        print_grid(console, grid)
        console.print()
    print_statements(console, findings(board))


def board_markdown(board: Leaderboard) -> str:
    """Return the table, the rankings and the findings as markdown."""
    tables = [f"**{grid.title}**\n\n{to_markdown(grid)}" for grid in board_grids(board)]
    verdict = "\n".join(f"{markdown_text(line)}\n" for line in board_verdict(board))
    return "\n".join(
        (verdict, *tables, "".join(f"- {markdown_text(s)}\n" for s in findings(board)))
    )


def board_csv(board: Leaderboard) -> str:
    """Return a row per model, in the form that `compare` reads."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("model", "n_bytes", *CRITERIA, "n_outliers"))
    for row in board.rows:
        values = [row.estimates[c].value if c in row.estimates else None for c in CRITERIA]
        writer.writerow((printable(row.label), row.n_bytes, *values, row.n_outliers))
    return out.getvalue()


def board_json(board: Leaderboard) -> str:
    """Return the figures, rankings and findings as one JSON document."""
    document = {
        "schema": "ramgguf.comparison/1",
        "models": [
            {
                "model": row.label,
                "n_bytes": row.n_bytes,
                **{c: e.value for c, e in row.estimates.items()},
                "n_outliers": row.n_outliers,
            }
            for row in board.rows
        ],
        "verdict": list(board_verdict(board)),
        "rankings": {r.criterion: list(r.order) for r in board.rankings},
        "statements": list(findings(board)),
    }
    return to_json(document, indent=1) + "\n"
