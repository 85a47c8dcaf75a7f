"""The first line of a comparison: which file to take and why; then what to distrust."""

import math

from ramgguf.core.units import format_bytes, format_count
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.leaderboard import KLD_CRITERIA, LABELS, Leaderboard, Pair, Row
from ramgguf.evaluate.recommendation import Recommendation, carried_criteria, recommend
from ramgguf.evaluate.result import FIRST_TOKENS
from ramgguf.evaluate.statistics import MIN_UNITS, n_units
from ramgguf.evaluate.summary import losses
from ramgguf.report.numbers import kld, ppl, ratio, with_interval
from ramgguf.report.sentences import listed

_SAME_SIZE = 0.01  # files whose sizes differ by less are called equal


def verdict_lines(report: EvalReport) -> tuple[str, ...]:
    """Return the verdict, and a line each for what is partial and what to distrust."""
    if report.board is None:
        return report.partial
    few = n_units(losses(report.summaries[0].result))
    lines = list(board_verdict(report.board))
    if few < MIN_UNITS and lines:
        lines[0] = f"Too few units of text ({few}) for a verdict. {lines[0]}"
    lines = [*report.partial, *lines]
    heavy = [s.label for s in report.summaries if s.tail.heavy]
    if heavy:
        lines.append(
            f"Distrust mean PPL of {listed(heavy)}: the tail is heavy, so it tells which sequences"
            " were drawn."
        )
    return tuple(lines)


def board_verdict(board: Leaderboard) -> tuple[str, ...]:
    """Return which file the leaderboard says to take, and which criteria few sequences carry."""
    found = recommend(board)
    if found is None:
        return ()
    rows = {r.label: r for r in board.rows}
    lines = [_verdict(found, rows)]
    if found.smaller:
        sizes = [f"{s} ({_size(rows[s])}, {_value(rows[s], found.by)})" for s in found.smaller]
        lines.append(f"Smaller, and best for their size: {listed(sizes)}.")
    if found.by == "late_kld":
        lines.append(
            f"Distrust mean KLD: without the first {FIRST_TOKENS} tokens of each window it prefers"
            " another file."
        )
    if carried := carried_criteria(board):
        n = len({i for d in board.disagreements for r in d.reversals for i in r.influential})
        lines.append(
            f"Distrust {listed([LABELS[c] for c in carried])}: {format_count(n, 'sequence')} of "
            f"{board.n_sequences} {'outweighs' if n == 1 else 'outweigh'} the rest."
        )
    return tuple(lines)


def _verdict(found: Recommendation, rows: dict[str, Row]) -> str:
    if found.take is None:
        said = [f"{LABELS[c]} prefers {label}" for c, label in found.preferred]
        return (
            f"No verdict: {listed(said)}, and published figures carry no sequences that could say"
            " which is right. Trust the median for ordinary text; look at the outliers."
        )
    take = rows[found.take]
    if found.rival is None:
        values = [f"{LABELS[c]} {ppl(take.estimates[c].value)}" for c in _known(take)]
        return (
            f"{found.take}: {listed(values)}; there is no second file or reference to judge it by."
        )
    rival = rows[found.rival]
    said = [_by_size(take, rival)]
    if "mean_kld" in take.estimates:
        said.append(_by_kld(found, take, rival))
    said += _by_ppl(found)
    if found.pair is None:
        if take.estimates[found.by].value == rival.estimates[found.by].value:
            return f"{found.take} = {found.rival}: the same {_value(take, found.by)}."
        said.append(f"{_value(take, found.by)} against {_value(rival, found.by)}; untested")
    text = f"{found.take}: {', '.join(s for s in said if s)}"
    if found.agree is not None:
        text += "; mean and median ΔNLL " + ("agree" if found.agree else "part")
    if found.pair is not None and not found.resolved and not rival.is_reference:
        text += f". Whether it is better than {found.rival} is unresolved"
    return text + "."


def _by_size(take: Row, rival: Row) -> str:
    if not take.n_bytes or not rival.n_bytes:
        return ""
    if rival.is_reference:
        return f"{take.n_bytes / rival.n_bytes:.0%} of {rival.label}'s size"
    if abs(take.n_bytes / rival.n_bytes - 1) < _SAME_SIZE:
        return "same size"
    change = take.n_bytes / rival.n_bytes - 1
    return f"{abs(change):.0%} {'larger' if change > 0 else 'smaller'} than {rival.label}"


def _by_kld(found: Recommendation, take: Row, rival: Row) -> str:
    criterion = "late_kld" if found.by == "late_kld" else "mean_kld"
    name = LABELS[criterion].removeprefix("mean ")
    if found.pair is not None and criterion in found.pair.ratios:
        if not math.isfinite(found.pair.ratios[criterion].value):
            return f"{name} {kld(take.estimates[criterion].value)}, and {rival.label} has none"
        times = ratio(found.pair.ratios[criterion])
        value, bracket, interval = times.partition(" (")
        return f"{name} {value} × {rival.label}’s{bracket}{interval}"
    return f"{name} {with_interval(take.estimates[criterion], kld)}"


def _by_ppl(found: Recommendation) -> list[str]:
    if found.pair is None:
        return []
    return [better_on(found.pair)] if found.rival else []


def better_on(pair: Pair) -> str:
    """Return on how many sequences the first model of a pair is better, or worse."""
    s = pair.sequences
    if s.n_better >= s.n_worse:
        return f"better on {s.n_better} of {format_count(s.n, 'sequence')}"
    return f"worse on {s.n_worse} of {format_count(s.n, 'sequence')}"


def _known(row: Row) -> list[str]:
    return [c for c in ("corpus_ppl", "median_ppl") if c in row.estimates]


def _value(row: Row, criterion: str) -> str:
    write = kld if criterion in KLD_CRITERIA else ppl
    return f"{LABELS[criterion].removeprefix('mean ')} {write(row.estimates[criterion].value)}"


def _size(row: Row) -> str:
    return "size unknown" if row.n_bytes is None else format_bytes(row.n_bytes)
