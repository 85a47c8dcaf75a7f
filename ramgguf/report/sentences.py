"""A leaderboard's findings in sentences."""

from collections.abc import Collection, Sequence

from ramgguf.core.units import format_count
from ramgguf.evaluate.leaderboard import (
    LABELS,
    Disagreement,
    Gap,
    InfluentialSequence,
    Leaderboard,
    Ranking,
    Reversal,
    Tie,
    Verdict,
)
from ramgguf.report.numbers import p_value, ppl, ratio

_MAX_RANKED = 4  # models in a ranking in a sentence; of more, only those it is about
_MAX_NAMED = 5  # sequences or pairs named in a sentence; the rest are counted
_MIN_GAP = 0.005  # of corpus and median PPL; less does not show in two decimals


def findings(board: Leaderboard) -> tuple[str, ...]:
    """Return what the leaderboard says beyond its table, one statement per item."""
    found: list[str] = []
    if board.disagreements:
        found.append(_disagreements(board))
    elif len(board.rows) > 1 and len(board.rankings) > 1:
        names = listed([LABELS[r.criterion] for r in board.rankings])
        found.append(f"No inversion: {names} rank the models alike.")
    found += _ties(board.ties)
    if board.gap is not None and abs(board.gap.value) >= _MIN_GAP:
        found.append(_gap(board.gap))
    return (*found, *(note if note.endswith(".") else f"{note}." for note in board.notes))


# --- where rankings part: one paragraph for all of them ---


def _disagreements(board: Leaderboard) -> str:
    parts = [_camps(board)]
    if all(r.verdict is Verdict.UNKNOWN for r in _reversals(board.disagreements)):
        parts.append(_unknown(board.disagreements))
    else:
        parts += _pairs(board.disagreements)
    influential = _influential(board.disagreements)
    parts += [_why(influential), _without(board.disagreements, len(influential))]
    return " ".join(filter(None, parts))


def _reversals(found: Sequence[Disagreement]) -> list[Reversal]:
    return [r for d in found for r in d.reversals]


def _camps(board: Leaderboard) -> str:
    """Return which criteria rank the models how."""
    only = _of_interest(board)
    camps: dict[str, list[str]] = {}
    for r in board.rankings:
        camps.setdefault(order(r, only), []).append(LABELS[r.criterion])
    said = [
        f"{listed(names)} {'ranks' if len(names) == 1 else 'rank'} {best_first}"
        for best_first, names in camps.items()
    ]
    full = any(d.full_inversion and len(d.first.order) > 2 for d in board.disagreements)
    return f"{'Full inversion: ' if full else 'Inversion: '}{'; '.join(said)}."


def _unknown(found: Sequence[Disagreement]) -> str:
    if all(r.sequences is None for r in _reversals(found)):
        return "Whether that is significant is unknown: aggregates carry no per-sequence losses."
    criteria = {d.first.criterion for d in found} & {"mean_ppl"}
    if criteria and all(d.first.criterion == "mean_ppl" for d in found):
        return (
            "Whether that is significant is unknown: a tail this heavy leaves mean PPL without a"
            " variance, and so without an interval."
        )
    return "Whether that is significant is unknown: there are too few sequences to tell."


def _pairs(found: Sequence[Disagreement]) -> list[str]:
    """Return a sentence per reversed pair, from the disagreement that says most about it."""
    rank = (Verdict.FEW, Verdict.SIGNIFICANT, Verdict.UNRESOLVED, Verdict.UNKNOWN)
    best: dict[frozenset[str], tuple[Disagreement, Reversal]] = {}
    for d in found:
        for r in d.reversals:
            key = frozenset((r.better, r.worse))
            if key not in best or rank.index(r.verdict) < rank.index(best[key][1].verdict):
                best[key] = d, r
    ordered = sorted(best.values(), key=lambda x: rank.index(x[1].verdict))
    said = [_pair(d, r) for d, r in ordered[:_MAX_NAMED]]
    if len(ordered) > _MAX_NAMED:
        said.append(f"Also reversed: {format_count(len(ordered) - _MAX_NAMED, 'pair')} more.")
    return said


def _pair(d: Disagreement, r: Reversal) -> str:
    s = r.sequences
    if s is None:
        return ""
    a, b, s = (
        (r.better, r.worse, s) if s.n_better >= s.n_worse else (r.worse, r.better, s.inverse())
    )
    counted = (
        f"{a} is better than {b} on {s.n_better} of {format_count(s.n, 'sequence')} (sign test p = "
        f"{p_value(s.p_sign)}; median ΔNLL {_delta(s.median_delta.value)}"
        + (
            f", {_delta(s.median_delta.low)} to {_delta(s.median_delta.high)})"
            if s.median_delta.low is not None and s.median_delta.high is not None
            else ")"
        )
    )
    ratios = [
        f"{LABELS[ranking.criterion]} × {ratio(found)}"
        for ranking, found in ((d.first, r.ratio_first), (d.second, r.ratio_second))
        if found is not None
    ]
    measured = f"{r.better} over {r.worse}: {listed(ratios)}"
    match r.verdict:
        case Verdict.FEW:
            return f"{counted}: few sequences outweigh the rest ({measured})."
        case Verdict.SIGNIFICANT:
            return f"{counted}. Significant: each criterion tells the two apart ({measured})."
        case Verdict.UNRESOLVED:
            return f"{counted}. Unresolved ({measured})."
    return f"{counted}. Unknown: without an interval ({measured})."


def _delta(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}".replace("-", "−")


def _influential(found: Sequence[Disagreement]) -> list[InfluentialSequence]:
    every = {s.sequence.index: s for d in reversed(found) for s in d.influential}
    return sorted(every.values(), key=lambda s: -max(s.ppl[label] for label in s.pair))


def _why(found: Sequence[InfluentialSequence]) -> str:
    if not found:
        return ""
    named = [_sequence(s) for s in found[:_MAX_NAMED]]
    if len(found) > _MAX_NAMED:
        named.append(f"{len(found) - _MAX_NAMED} more")
    count = "One sequence causes" if len(found) == 1 else f"{len(found)} sequences cause"
    return f"{count} it: {listed(named, '; ')}."


def _sequence(s: InfluentialSequence) -> str:
    high, low = sorted(s.pair, key=s.ppl.__getitem__, reverse=True)
    where = f" ({s.sequence.title})" if s.sequence.title else ""
    return (
        f"#{s.sequence.index}{where}, PPL {ppl(s.ppl[high])} under {high},"
        f" {ppl(s.ppl[low])} under {low}"
    )


def _without(found: Sequence[Disagreement], n: int) -> str:
    """Return how the criteria rank the models without the influential sequences."""
    left = [r for d in found if d.without is not None for r in d.without]
    if not left:
        return ""
    what = "it" if n == 1 else "them"
    said: dict[str, dict[str, None]] = {}
    for r in left:
        said.setdefault(order(r), {})[LABELS[r.criterion]] = None
    if len(said) == 1:
        return f"Without {what} all rank {next(iter(said))}."
    return (
        f"Without {what} "
        + "; ".join(
            f"{listed(list(names))} rank{'s' if len(names) == 1 else ''} {best_first}"
            for best_first, names in said.items()
        )
        + "."
    )


# --- ties and gaps ---


def _ties(ties: Sequence[Tie]) -> list[str]:
    """Return one statement of the neighbours in rankings that are not told apart."""
    by_pair: dict[frozenset[str], list[Tie]] = {}
    for tie in ties:
        by_pair.setdefault(frozenset((tie.better, tie.worse)), []).append(tie)
    said = [
        f"{found[0].better} and {found[0].worse} by "
        + listed([f"{LABELS[t.criterion]} (p = {p_value(t.ratio.p or 0)})" for t in found])
        for found in by_pair.values()
    ]
    if len(said) > _MAX_NAMED:
        said = [*said[:_MAX_NAMED], f"{format_count(len(said) - _MAX_NAMED, 'more pair')}"]
    return [f"Unresolved (Holm-corrected): {listed(said, '; ')}."] if said else []


def _gap(gap: Gap) -> str:
    return (
        f"Corpus and median PPL of one model part by up to {abs(gap.value):.2f} ({gap.label}:"
        f" {ppl(gap.corpus_ppl)} against {ppl(gap.median_ppl)})."
    )


def order(ranking: Ranking, only: Collection[str] | None = None) -> str:
    """Return the labels (or those in `only`) best first: A < B = C."""
    shown = ranking if only is None else ranking.only(frozenset(only))
    if not shown.order:
        return ""
    equal = shown.equal or (False,) * (len(shown.order) - 1)
    signs = [" = " if same else " < " for same in equal]
    return shown.order[0] + "".join(s + a for s, a in zip(signs, shown.order[1:], strict=True))


def _of_interest(board: Leaderboard) -> Collection[str] | None:
    """Return the models that disagreements are about; None, for all, where they are few."""
    if len(board.rows) <= _MAX_RANKED:
        return None
    found = {label for r in _reversals(board.disagreements) for label in (r.better, r.worse)}
    return found or None


def listed(items: Sequence[str], comma: str = ", ") -> str:
    """Return items as a list in a sentence: a, b and c; a; b; and c."""
    if len(items) < 2:
        return "".join(items)
    return comma.join(items[:-1]) + (" and " if comma == ", " else f"{comma}and ") + items[-1]
