"""Results of several texts: by text, and pooled as if all were one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf.core.corpus import Text
from ramgguf.evaluate.result import BrokenSequence, EvalResult, SequenceScore, kld_figures


@dataclass(frozen=True)
class DomainResults:
    """The results of one text (in windows of one length): what tables call it, one per model."""

    label: str
    results: tuple[EvalResult, ...]


def by_text(results: Sequence[EvalResult]) -> tuple[DomainResults, ...]:
    """Return the results of each text and window length, in their order.

    Where these are not of the same models, all results are one group: nothing can be pooled.
    """
    if not results:
        return (DomainResults("", ()),)
    groups: dict[tuple[str, str, int], list[EvalResult]] = {}
    for r in results:
        groups.setdefault((r.text.sha256, r.protocol.name, r.protocol.n_ctx), []).append(r)
    if len({_models(group) for group in groups.values()}) > 1:
        return (DomainResults(results[0].text.name, tuple(results)),)
    names = [group[0].text.name for group in groups.values()]
    return tuple(
        DomainResults(
            name if names.count(name) == 1 else f"{name}, {group[0].protocol.n_ctx} tokens",
            tuple(group),
        )
        for name, group in zip(names, groups.values(), strict=True)
    )


def _models(group: Sequence[EvalResult]) -> frozenset[tuple[str, str | None]]:
    return frozenset((r.model.header_sha256, r.model.sample_sha256) for r in group)


def pooled(domains: Sequence[DomainResults]) -> tuple[EvalResult, ...] | None:
    """Return each model's result on all texts together; None where a text is there twice.

    Every token counts alike. Articles stay apart: a text without any has a unit per sequence.
    """
    texts = [d.results[0].text.sha256 for d in domains]
    if len(set(texts)) < len(texts):
        return None
    found = []
    for first in domains[0].results:
        mine = [next(r for r in d.results if _same(r, first)) for d in domains]
        found.append(_pool(domains, mine))
    return tuple(found)


def _same(a: EvalResult, b: EvalResult) -> bool:
    return _models([a]) == _models([b])


def _pool(domains: Sequence[DomainResults], mine: Sequence[EvalResult]) -> EvalResult:
    sequences: list[SequenceScore] = []
    broken: list[BrokenSequence] = []
    first = 0
    for domain, result in zip(domains, mine, strict=True):
        for s in result.sequences:
            title = f"{domain.label}: {s.title or f'#{s.index}'}"
            sequences.append(s.model_copy(update={"index": first + s.index, "title": title}))
        broken += [b.model_copy(update={"index": first + b.index}) for b in result.broken]
        first += result.protocol.n_windows
    protocols = [r.protocol for r in mine]
    protocol = protocols[0].model_copy(
        update={
            "n_ctx": max(p.n_ctx for p in protocols),
            "n_windows": first,
            "n_seq": sum(p.n_seq for p in protocols),
            "n_seq_wanted": None,
        }
    )
    update = {
        "text": Text(
            name=" + ".join(d.label for d in domains),
            n_bytes=sum(r.text.n_bytes for r in mine),
            sha256=_joint([r.text.sha256 for r in mine]),
        ),
        "token_ids_sha256": _joint([r.token_ids_sha256 for r in mine]),
        "protocol": protocol,
        "sequences": tuple(sequences),
        "broken": tuple(broken),
        **kld_figures(sequences),
        "llama_statistics": None,
        "failure": next((r.failure for r in mine if r.failure), None),
        "notes": tuple(dict.fromkeys(n for r in mine for n in r.notes)),
        "seconds": sum(r.seconds for r in mine),
        "decode_seconds": sum(r.decode_seconds for r in mine),
    }
    return mine[0].model_copy(update=update)


def _joint(hashes: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
