"""The sequences that results are compared on: the same for every table, test and figure."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.core.errors import ResultError
from ramgguf.core.units import format_count
from ramgguf.evaluate.result import EvalResult, SequenceScore, incomparable, kld_figures
from ramgguf.gguf.identity import difference

_MIN_FINISHED = 0.9  # of the protocol's sequences; below, a model is not ranked beside whole ones


@dataclass(frozen=True, eq=False)
class Common:
    """Results cut to the sequences that all of them finished; references that are none of them too.

    left_out finished too few. partial names each result that lacks sequences of the protocol.
    """

    results: tuple[EvalResult, ...]
    left_out: tuple[EvalResult, ...]
    indices: tuple[int, ...]
    partial: tuple[str, ...]
    notes: tuple[str, ...]


def common_sequences(results: Sequence[EvalResult]) -> Common:
    """Return the results on their common sequences.

    Raises ResultError when they were not measured alike or share nothing. The losses of a
    reference, which its results carry, make it a result as well, but one without KLD.
    """
    check_comparable(results)
    whole = [r for r in results if _is_whole(r)]
    kept = whole or [r for r in results if r.sequences]
    if not kept:
        raise ResultError("nothing to compare: no result has a finished sequence")
    left_out = [r for r in results if not any(r is k for k in kept)]
    shared = set.intersection(*({s.index for s in r.sequences} for r in kept))
    if not shared:
        raise ResultError("nothing to compare: no sequence was finished by all results")
    indices = tuple(sorted(shared))
    notes = [_left_out(r) for r in left_out]
    broken = [line for r in kept for line in broken_lines(r)]
    notes += [f"{line}, which no model is ranked on: distrust it" for line in dict.fromkeys(broken)]
    most = max(len(r.sequences) for r in kept)
    if len(shared) < most:
        notes.append(
            f"Everything is computed on the {format_count(len(shared), 'sequence')} that all "
            f"finished, of {most}"
        )
    cut = [_cut(r, shared) for r in kept]
    _check_same_tokens(cut)
    partial = tuple(p for r in kept if (p := partial_line(r)) is not None)
    references = _references(cut)
    return Common((*references, *cut), tuple(left_out), indices, partial, tuple(notes))


def check_comparable(results: Sequence[EvalResult]) -> None:
    """Raise ResultError when there are no results, or two that were not measured alike."""
    if not results:
        raise ResultError("nothing to compare: expected at least one result")
    for a, b in itertools.combinations(results, 2):
        if reasons := incomparable(a, b):
            raise ResultError(
                f"{a.model.path} and {b.model.path} may not be ranked together; they differ in "
                + "; ".join(reasons)
                + ". Evaluate them again in one run"
            )


def broken_lines(result: EvalResult) -> tuple[str, ...]:
    """Return which models gave NaN or infinite logits in how many sequences of the result."""
    n_all = len(result.sequences) + len(result.broken)
    counts = [(result.model.label, sum(b.in_model for b in result.broken))]
    if result.reference is not None:
        counts.append((result.reference.label, sum(b.in_reference for b in result.broken)))
    return tuple(
        f"{label} gave NaN or infinite logits in "
        + ("all " if n == n_all and n > 1 else "")
        + format_count(n, "sequence")
        for label, n in counts
        if n
    )


def why_missing(result: EvalResult) -> str:
    """Return why a result lacks sequences; nothing where that is not known."""
    return "; ".join(filter(None, (result.failure, *broken_lines(result))))


def partial_line(result: EvalResult) -> str | None:
    """Return that the result lacks sequences of its protocol; None for a whole one."""
    n, wanted = len(result.sequences), result.protocol.n_seq
    if n + len(result.broken) >= wanted:
        return None
    return (
        f"{result.model.label} is partial: {n} of {format_count(wanted, 'sequence')}, the first of "
        "the text; its figures are not the protocol's. `ramgguf eval --resume` finishes it"
    )


def is_reference(result: EvalResult, results: Sequence[EvalResult]) -> bool:
    """Return whether another result, or this one itself, was measured against this model."""
    return any(
        r.reference is not None and difference(r.reference, result.model) is None for r in results
    )


def _is_whole(result: EvalResult) -> bool:
    return len(result.sequences) >= _MIN_FINISHED * result.protocol.n_seq


def _left_out(result: EvalResult) -> str:
    why = why_missing(result)
    return (
        f"{result.model.label} finished {len(result.sequences)} of "
        f"{format_count(result.protocol.n_seq, 'sequence')} "
        "and is not ranked" + (f": {why}" if why else "")
    )


def _cut(result: EvalResult, shared: set[int]) -> EvalResult:
    if {s.index for s in result.sequences} == shared:
        return result
    kept = tuple(s for s in result.sequences if s.index in shared)
    update = {"sequences": kept, **kld_figures(kept), "llama_statistics": None}
    return result.model_copy(update=update)


def _check_same_tokens(results: Sequence[EvalResult]) -> None:
    first = {s.index: s.n_scored for s in results[0].sequences}
    for r in results[1:]:
        for s in r.sequences:
            if s.n_scored != first[s.index]:
                raise ResultError(
                    f"{results[0].model.path} and {r.model.path} may not be ranked together: "
                    f"sequence {s.index} has {first[s.index]} scored tokens in the one and "
                    f"{s.n_scored} in the other. Evaluate them again in one run"
                )


def _references(results: Sequence[EvalResult]) -> list[EvalResult]:
    """Return the references that are not among the results, from the losses that these carry."""
    known = [r.model for r in results]
    found: list[EvalResult] = []
    for r in results:
        if r.reference is None or any(difference(r.reference, m) is None for m in known):
            continue
        if any(s.reference_nll_sum is None for s in r.sequences):
            continue
        known.append(r.reference)
        scores = tuple(_reference_score(s) for s in r.sequences)
        update = {
            "model": r.reference,
            "reference": None,
            "sequences": scores,
            "broken": (),
            "kld_quantiles": None,
            "kld_worst_share": None,
            "llama_statistics": None,
            "failure": None,
            "notes": (),
        }
        found.append(r.model_copy(update=update))
    return found


def _reference_score(score: SequenceScore) -> SequenceScore:
    return SequenceScore(
        index=score.index,
        title=score.title,
        text_start=score.text_start,
        text_end=score.text_end,
        excerpt=score.excerpt,
        n_scored=score.n_scored,
        nll_sum=score.reference_nll_sum or 0.0,
    )
