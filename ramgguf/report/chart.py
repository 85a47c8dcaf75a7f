"""A text chart of quality against size, for terminals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ramgguf.core.escape import printable
from ramgguf.core.units import format_bytes
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.leaderboard import LABELS, Leaderboard, Row
from ramgguf.report.numbers import kld, ppl

_HEIGHT = 9
_GUTTER = 9  # characters of the value axis


@dataclass(frozen=True)
class Point:
    """A file in the chart: bytes and the criterion's value; on the front no file beats it."""

    label: str
    size: int
    value: float
    on_front: bool


def points(rows: Sequence[Row], criterion: str) -> list[Point]:
    """Return the files with a size and a positive value, and which are on the Pareto front."""
    known = [
        (r, r.n_bytes, r.estimates[criterion].value)
        for r in rows
        if r.n_bytes and criterion in r.estimates and r.estimates[criterion].value > 0
    ]
    return [
        Point(
            row.label,
            size,
            value,
            not any((n <= size and v < value) or (n < size and v <= value) for _, n, v in known),
        )
        for row, size, value in known
    ]


def charted_criterion(board: Leaderboard) -> str:
    """Return what is drawn against size: KLD where all files have it, else the median PPL."""
    files = [r for r in board.rows if not r.is_reference]
    has_kld = bool(files) and all("mean_kld" in r.estimates for r in files)
    return "mean_kld" if has_kld else "median_ppl"


def chart(report: EvalReport, width: int) -> list[str]:
    """Return the lines of the chart; none for fewer than two files."""
    return [] if report.board is None else board_chart(report.board, width)


def board_chart(board: Leaderboard, width: int) -> list[str]:
    """Return the lines of the leaderboard's chart, labels at the points; none without two files."""
    criterion = charted_criterion(board)
    write = kld if criterion == "mean_kld" else ppl
    rows = [r for r in board.rows if criterion != "mean_kld" or not r.is_reference]
    found = points(rows, criterion)
    if len(found) < 2 or width < 40:
        return []
    inner = width - _GUTTER - 2
    canvas = [[" "] * inner for _ in range(_HEIGHT)]
    xs = _scale([p.size for p in found], inner - 1 - min(18, inner // 3))
    ys = _scale([p.value for p in found], _HEIGHT - 1)
    for p in sorted(found, key=lambda p: not p.on_front):
        x, y = xs(p.size), _HEIGHT - 1 - ys(p.value)
        _put(canvas, x, y, "●" if p.on_front else "○", printable(p.label))
    top, bottom = max(p.value for p in found), min(p.value for p in found)
    marks = {0: write(top), _HEIGHT - 1: write(bottom) if bottom < top else ""}
    lines = [f"{LABELS[criterion]} against size (● no file here is smaller and better)"]
    lines += [
        f"{marks.get(i, ''):>{_GUTTER}} │{''.join(row).rstrip()}" for i, row in enumerate(canvas)
    ]
    small, large = (format_bytes(f(p.size for p in found)) for f in (min, max))
    lines.append(f"{'':>{_GUTTER}} └{'─' * inner}")
    lines.append(f"{'':>{_GUTTER + 2}}{small}{large:>{inner - len(small)}}".rstrip())
    for r in board.rows:
        if r.is_reference and criterion == "mean_kld" and r.n_bytes:
            lines.append(f"{'':>{_GUTTER + 2}}baseline {r.label}: {format_bytes(r.n_bytes)}, KLD 0")
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _scale(values: Sequence[float], length: int) -> Callable[[float], int]:
    """Return a function from a positive value to a whole place from 0 to length, by logarithm."""
    low, high = math.log(min(values)), math.log(max(values))
    if high - low < 1e-9:
        return lambda value: length // 2
    return lambda value: round((math.log(value) - low) / (high - low) * length)


def _put(canvas: list[list[str]], x: int, y: int, mark: str, label: str) -> None:
    """Write mark and label where they cover nothing: right of the point, left, or a line away."""
    width = len(canvas[0])
    canvas[y][x] = mark
    label = label if len(label) <= width // 3 else label[: width // 3 - 1] + "…"
    for row in (y, y - 1, y + 1, y - 2, y + 2):
        for start in (x + 2, x - 1 - len(label)):
            if not 0 <= row < len(canvas) or start < 0 or start + len(label) > width:
                continue
            if all(c == " " for c in canvas[row][max(0, start - 1) : start + len(label) + 1]):
                canvas[row][start : start + len(label)] = label
                return
