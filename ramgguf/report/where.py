"""Where a model parts from its reference: by position in the window, class of token, worst ones."""

import math
from collections.abc import Callable, Iterator, Sequence

from ramgguf.core.escape import printable
from ramgguf.evaluate.eval_report import EvalReport
from ramgguf.evaluate.result import FIRST_TOKENS, EvalResult, SequenceScore, WorstToken
from ramgguf.evaluate.summary import AgainstReference, Summary
from ramgguf.evaluate.token_groups import TokenGroup, by_class, by_position, worst_tokens
from ramgguf.report.grid import Field, Grid, grid_of
from ramgguf.report.numbers import kld, percent

_MUCH_FIRST = 0.1  # of all KLD in the first tokens is worth a sentence,
_TIMES_FIRST = 5  # where it is so many times their share of the tokens
_MUCH_WORST = 0.25  # of all KLD in the worst thousandth of the tokens
_MAX_NAMED = 3
_N_WORST = 12
_N_WORST_JSON = 40

NO_PLACES = "--where: these results do not say where KLD falls; score them again, with --reference"

Groups = Callable[[EvalResult], list[TokenGroup]]


def against_reference(report: EvalReport) -> list[tuple[Summary, AgainstReference]]:
    """Return the models that were scored against a reference."""
    return [(s, s.against) for s in report.summaries if s.against is not None]


def where_grids(report: EvalReport) -> list[Grid]:
    """Return tables by position, by class and of the worst tokens; none where none is known."""
    found = [
        _group_grid(report, "KLD by position in the window", "position", by_position),
        _group_grid(report, "KLD by class of token", "token", by_class),
        _worst_grid(report),
    ]
    return [grid for grid in found if grid.rows]


def _group_grid(report: EvalReport, title: str, heading: str, groups: Groups) -> Grid:
    """Return a row per group, with mean KLD, share of all KLD and same top p of each model."""
    known = [(s.label, groups(s.result)) for s, _ in against_reference(report)]
    known = [(label, found) for label, found in known if found]
    labels = list(dict.fromkeys(g.label for _, found in known for g in found))
    counts = {g.label: g.n for _, found in known for g in found}
    fields: list[Field[str]] = [
        Field(heading, lambda x: x, number=False),
        Field("tokens", lambda x: f"{counts[x]:,}", 3),
    ]
    for label, found in known:
        by_label = {g.label: g for g in found}
        name = f"{label}: " if len(known) > 1 else ""
        fields += [
            Field(f"{name}KLD", _cell(by_label, lambda g: kld(g.kld))),
            Field("of all", _cell(by_label, lambda g: f"{100 * g.share:.1f} %"), 2),
            Field("same top p", _cell(by_label, lambda g: percent(g.same_top_p)), 1),
        ]
    return grid_of(title, fields, labels)


def _cell(
    groups: dict[str, TokenGroup], write: Callable[[TokenGroup], str]
) -> Callable[[str], str]:
    return lambda label: write(groups[label]) if label in groups else ""


Worst = tuple[str, SequenceScore, WorstToken]


def _worst_grid(report: EvalReport) -> Grid:
    """Return the tokens of the largest KLD of all models, the windows' first ones left out."""
    found: list[Worst] = [
        (s.label, sequence, token)
        for s, _ in against_reference(report)
        for sequence, token in worst_tokens(s.result, _N_WORST)
    ]
    found.sort(key=lambda x: -x[2].kld)
    fields: list[Field[Worst]] = [
        Field("model", lambda x: x[0], number=False),
        Field("KLD", lambda x: kld(x[2].kld)),
        Field("p base", lambda x: _probability(x[2].reference_nll), 3),
        Field("p", lambda x: _probability(x[2].nll), 3),
        Field("sequence", lambda x: f"#{x[1].index}, {x[2].position}", 4),
        Field("text, and the token", lambda x: marked(x[2]), number=False),
    ]
    title = f"Worst tokens, the first {FIRST_TOKENS} of each window left out"
    return grid_of(title, fields, found[:_N_WORST])


def marked(token: WorstToken, n_before: int = 40) -> str:
    """Return the end of the text before a token and the token in brackets, on one line."""
    before, text = (printable(x.replace("\n", "⏎")) for x in (token.before[-n_before:], token.text))
    return f"{before}⟦{text}⟧"


def _probability(nll: float | None) -> str:
    return "" if nll is None else f"{100 * math.exp(-max(0.0, nll)):.2g} %"


# --- sentences ---


def kld_sentences(report: EvalReport) -> Iterator[str]:
    """Yield what parts a model's mean KLD from its typical one, and rankings that it changes."""
    found = against_reference(report)
    first = [
        f"{share:.0%} of {s.label}'s (mean {kld(a.divergences['mean_kld'].value)}, from token"
        f" {FIRST_TOKENS} on {kld(a.divergences['late_kld'].value)})"
        for s, a in found
        if a.first is not None
        and (share := a.first.share_of_kld) >= _MUCH_FIRST
        and share >= _TIMES_FIRST * a.first.share_of_tokens
    ]
    if first:
        yield (
            f"The first {FIRST_TOKENS} tokens of each window carry much of the KLD:"
            f" {_named(first)}. There the model has next to no context."
        )
    worst = [
        f"{share:.0%} of {s.label}'s (mean {kld(a.divergences['mean_kld'].value)}, median"
        f" {kld(a.quantiles.median)})"
        for s, a in found
        if a.quantiles is not None and (share := a.quantiles.worst_share or 0.0) >= _MUCH_WORST
    ]
    if worst:
        yield f"The worst 0.1 % of the tokens carry much of the KLD: {_named(worst)}."
    yield from _orders(found)


def _orders(found: Sequence[tuple[Summary, AgainstReference]]) -> Iterator[str]:
    """Yield how median and P99 of the tokens' KLD rank the models, where the mean does not."""
    if len(found) < 2 or any(a.quantiles is None for _, a in found):
        return
    if len({a.label for _, a in found}) > 1:
        return
    mean = _order({s.label: a.divergences["mean_kld"].value for s, a in found})
    others = {
        name: _order({s.label: value(a) for s, a in found})
        for name, value in (("median", _median), ("P99", _p99))
    }
    parted = [f"by {name} {order}" for name, order in others.items() if order != mean]
    if parted:
        yield (f"KLD over tokens ranks {' and '.join(parted)}, without intervals; by mean {mean}.")


def _median(against: AgainstReference) -> float:
    return against.quantiles.median if against.quantiles else math.nan


def _p99(against: AgainstReference) -> float:
    return against.quantiles.p99 if against.quantiles else math.nan


def _order(values: dict[str, float]) -> str:
    return " < ".join(sorted(values, key=lambda label: (values[label], label)))


def _named(items: Sequence[str]) -> str:
    shown = list(items[:_MAX_NAMED])
    if len(items) > _MAX_NAMED:
        shown.append(f"{len(items) - _MAX_NAMED} more")
    return ", ".join(shown)


# --- JSON ---


def where_json(report: EvalReport) -> list[dict[str, object]]:
    """Return, per model, KLD by position and class and the worst tokens, as JSON values."""
    return [
        {
            "model": s.label,
            "by_position": [_group(g) for g in by_position(s.result)],
            "by_class": [_group(g) for g in by_class(s.result)],
            "worst_tokens": [
                {"sequence": sequence.index, "title": sequence.title, **token.model_dump()}
                for sequence, token in worst_tokens(s.result, _N_WORST_JSON)
            ],
        }
        for s, _ in against_reference(report)
    ]


def _group(group: TokenGroup) -> dict[str, object]:
    return {
        "group": group.label,
        "n": group.n,
        "mean_kld": group.kld,
        "share_of_kld": group.share,
        "same_top_p": group.same_top_p,
    }
