"""A leaderboard's findings in sentences."""

from collections.abc import Collection, Sequence

from ramgguf.evaluate.leaderboard import (
    LABELS,
    SIGNIFICANCE,
    Culprit,
    Disagreement,
    Gap,
    Leaderboard,
    Ranking,
    Reversal,
    Tie,
    Verdict,
)
from ramgguf.report.numbers import p_value, ppl

_MAX_RANKED = 4  # models in a ranking in a sentence; of more, only those it is about
_MAX_NAMED = 5  # culprits or pairs named in a sentence; the rest are counted


def findings(board: Leaderboard) -> tuple[str, ...]:
    """Return what the leaderboard says beyond its table, one statement per item."""
    groups: dict[object, list[Disagreement]] = {}
    for d in board.disagreements:
        groups.setdefault(_same_story(d), []).append(d)
    found: list[str] = []
    told: list[Disagreement] = []
    for group in groups.values():
        found.append(_disagreement(group, named_before=any(_alike(group[0], e) for e in told)))
        told += group
    if not found and len(board.rows) > 1 and len(board.rankings) > 1:
        names = _list([LABELS[r.criterion] for r in board.rankings])
        found = [f"No inversion: {names} rank the models alike."]
    found += _ties(board.ties)
    if board.gap is not None and board.gap.value:
        found.append(_gap(board.gap))
    return (*found, *(f"{note}." for note in board.notes))


def _same_story(d: Disagreement) -> object:
    """Return a key that disagreements share when one sentence can tell them all.

    They are about one pair of models, with the same sequences as their cause, and all significant
    or all unknown. (What is noise is told criterion by criterion, with its p-values.)
    """
    pairs = frozenset(frozenset((r.better, r.worse)) for r in d.reversals)
    verdicts = {r.verdict for r in d.reversals}
    if len(pairs) > 1 or Verdict.NOISE in verdicts:
        return d.first.criterion, d.second.criterion
    return pairs, tuple(verdicts), tuple(c.sequence.index for c in d.culprits)


def _disagreement(group: Sequence[Disagreement], *, named_before: bool) -> str:
    d = group[0]
    what = _what(d) if len(group) == 1 else _camps(group)
    if not named_before:
        parts = (what, _significance(group), _why(d.culprits), _without(d))
    else:
        cause = "The same sequence causes" if len(d.culprits) == 1 else "The same sequences cause"
        parts = (what, _significance(group), f"{cause} it.", _without(d))
    return " ".join(filter(None, parts))


def _camps(group: Sequence[Disagreement]) -> str:
    """Return which criteria prefer which of the only two models that the group is about."""
    camps: dict[str, dict[str, None]] = {}
    for d in group:
        (pair,) = d.reversals
        camps.setdefault(pair.better, {})[LABELS[d.first.criterion]] = None
        camps.setdefault(pair.worse, {})[LABELS[d.second.criterion]] = None
    (a, for_a), (b, for_b) = camps.items()
    verbs = ["puts" if len(camp) == 1 else "put" for camp in (for_a, for_b)]
    return (
        f"{_capital(_list(list(for_a)))} {verbs[0]} {a} before {b}, {_list(list(for_b))} {verbs[1]}"
        f" {b} before {a}."
    )


def _alike(a: Disagreement, b: Disagreement) -> bool:
    places = [[c.sequence.index for c in d.culprits] for d in (a, b)]
    return bool(places[0]) and places[0] == places[1]


def _what(d: Disagreement) -> str:
    only = _of_interest(d)
    first, second = LABELS[d.first.criterion], LABELS[d.second.criterion]
    if d.full_inversion and len(d.first.order) > 2:
        return (
            f"Full inversion: {first} ranks {order(d.first)}, and {second} ranks them exactly the"
            f" other way round, {order(d.second)}."
        )
    if len(d.reversals) == 1:
        (pair,) = d.reversals
        return (
            f"{_capital(first)} puts {pair.better} before {pair.worse}, {second} puts {pair.worse}"
            f" before {pair.better}."
        )
    pairs = _list([f"{r.better} vs {r.worse}" for r in d.reversals[:_MAX_NAMED]])
    more = len(d.reversals) - _MAX_NAMED
    pairs += f" and {more} more" if more > 0 else ""
    return (
        f"{_capital(first)} and {second} order {len(d.reversals)} pairs in opposite ways ({pairs}):"
        f" {order(d.first, only)} against {order(d.second, only)}."
    )


def _significance(group: Sequence[Disagreement]) -> str:
    """Return whether the reversals mean anything, p-values corrected over all pairs."""
    reversals = [r for d in group for r in d.reversals]
    if all(r.difference_first is None for r in reversals):
        return "Whether that is significant is unknown: aggregates carry no per-sequence losses."
    if any(r.verdict is Verdict.UNKNOWN for r in reversals):
        return f"Whether that is significant is unknown: {_untestable(group)}."
    real = [r for r in reversals if r.verdict is Verdict.SIGNIFICANT]
    if len(reversals) == 1 and not real:
        return f"That is noise: {_blind(group[0])}."
    if not real:
        return (
            f"That is noise: for none of the {len(reversals)} pairs do both criteria tell the two"
            f" models apart (Holm-corrected p ≥ {p_value(min(_p(r) for r in reversals))})."
        )
    p = p_value(max(_p(r) for r in real))
    if len(real) == len(reversals):
        return (
            "That is significant: each criterion on its own tells the models apart"
            f" (Holm-corrected p ≤ {p})."
        )
    pairs = _list([f"{r.better} vs {r.worse}" for r in real[:_MAX_NAMED]])
    return f"That is significant for {pairs} (Holm-corrected p ≤ {p}) and noise for the others."


def _untestable(group: Sequence[Disagreement]) -> str:
    """Return why a criterion has no interval."""
    untested = {
        ranking.criterion
        for d in group
        for ranking, tests in (
            (d.first, [r.difference_first for r in d.reversals]),
            (d.second, [r.difference_second for r in d.reversals]),
        )
        if any(t is None or t.p is None for t in tests)
    }
    if untested == {"mean_ppl"}:
        return "a tail this heavy leaves mean PPL without a variance, and so without an interval"
    return "there are too few sequences to tell"


def _blind(d: Disagreement) -> str:
    """Return which criterion does not tell the two models of the only reversal apart."""
    (pair,) = d.reversals
    blind = [
        f"{LABELS[ranking.criterion]} (Holm-corrected p = {p_value(found.p)})"
        for ranking, found in ((d.first, pair.difference_first), (d.second, pair.difference_second))
        if found is not None and found.p is not None and found.p >= SIGNIFICANCE
    ]
    if len(blind) == 2:
        return f"neither {blind[0]} nor {blind[1]} tells the two apart"
    return f"{blind[0]} does not tell the two apart"


def _p(reversal: Reversal) -> float:
    """Return the larger of the two p-values: both criteria have to speak."""
    found = (reversal.difference_first, reversal.difference_second)
    return max(d.p for d in found if d is not None and d.p is not None)


def _why(culprits: Sequence[Culprit]) -> str:
    if not culprits:
        return ""
    worst = sorted(culprits, key=lambda c: -max(c.ppl.values()))
    named = [_culprit(c) for c in worst[:_MAX_NAMED]]
    if len(worst) > _MAX_NAMED:
        named.append(f"{len(worst) - _MAX_NAMED} more")
    count = "One sequence causes" if len(worst) == 1 else f"{len(worst)} sequences cause"
    return f"{count} it: {_list(named, '; ')}."


def _culprit(c: Culprit) -> str:
    high, low = max(c.ppl, key=c.ppl.__getitem__), min(c.ppl, key=c.ppl.__getitem__)
    where = f" ({c.sequence.title})" if c.sequence.title else ""
    return (
        f"#{c.sequence.index}{where}, PPL {ppl(c.ppl[high])} under {high},"
        f" {ppl(c.ppl[low])} under {low}"
    )


def _without(d: Disagreement) -> str:
    if d.without is None:
        return ""
    first, second = d.without
    only = _of_interest(d)
    what = "it" if len(d.culprits) == 1 else "them"
    if order(first, only) == order(second, only):
        return f"Without {what} both rank {order(first, only)}."
    return (
        f"Without {what} {LABELS[first.criterion]} ranks {order(first, only)},"
        f" {LABELS[second.criterion]} {order(second, only)}."
    )


def _ties(ties: Sequence[Tie]) -> list[str]:
    """Return a statement per criterion that does not tell neighbours in its ranking apart."""
    by_criterion: dict[str, list[Tie]] = {}
    for tie in ties:
        by_criterion.setdefault(tie.criterion, []).append(tie)
    return [
        f"{_capital(LABELS[criterion])} does not tell apart "
        + _list(
            [
                f"{t.better} and {t.worse} (Holm-corrected p = {p_value(t.difference.p or 0)})"
                for t in found
            ],
            "; ",
        )
        + "."
        for criterion, found in by_criterion.items()
    ]


def _gap(gap: Gap) -> str:
    return (
        f"Corpus and median PPL of one model part by up to {abs(gap.value):.2f} ({gap.label}:"
        f" {ppl(gap.corpus_ppl)} against {ppl(gap.median_ppl)})."
    )


def order(ranking: Ranking, only: Collection[str] | None = None) -> str:
    """Return the labels (or those in `only`) best first: A < B < C."""
    return " < ".join(label for label in ranking.order if only is None or label in only)


def _of_interest(d: Disagreement) -> Collection[str] | None:
    """Return the models that a disagreement is about; None, for all, where they are few."""
    if len(d.first.order) <= _MAX_RANKED:
        return None
    return {label for r in d.reversals for label in (r.better, r.worse)}


def _list(items: Sequence[str], comma: str = ", ") -> str:
    if len(items) < 2:
        return "".join(items)
    return comma.join(items[:-1]) + (" and " if comma == ", " else f"{comma}and ") + items[-1]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
