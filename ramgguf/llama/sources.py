"""What a model reads: one or several sources of tokens, with weights.

self,mix,FILE:2 reads half of the sequences from the file, a quarter from the model itself and a
quarter from the texts of the package; these stand for one source each of their domains.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.domains import domain_corpora
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.tokens import TOKENS, TokenRequest, TokenSource, parse_tokens

MIX = "mix"
_WEIGHT = re.compile(r"(?P<name>.+?):(?P<weight>\d+(?:\.\d*)?|\.\d+)")


class Draws(Protocol):
    """What draws the sequences of one source: a ForwardRunner."""

    def draw(self, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
        """Return the sequences of these numbers."""

    def draw_sets(
        self, request: TokenRequest, sizes: Sequence[int], first: int
    ) -> tuple[tuple[TokenIds, ...], ...]:
        """Return sets of sequences; no token of a text is in two of them."""


def parse_sources(text: str, file: GGUFFile) -> tuple[TokenSource, ...]:
    """Return the sources in a list such as self,mix,FILE:2, whose weights add up to 1.

    Raises EngineError for one that is neither self, mix, random, wikitext nor a file.
    """
    found: list[TokenSource] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        weighed = _WEIGHT.fullmatch(part)
        name, weight = (weighed["name"], float(weighed["weight"])) if weighed else (part, 1.0)
        if name == MIX:
            corpora = domain_corpora(file, "calibrate")
            found += [
                TokenSource(domain, weight / len(corpora), "text", corpus)
                for domain, corpus in corpora.items()
            ]
            continue
        try:
            kind, corpus = parse_tokens(name)
        except EngineError:
            if weighed is None:
                raise
            kind, corpus = parse_tokens(part)  # a file whose name ends like a weight
            name, weight = part, 1.0
        found.append(TokenSource(name, weight, kind, corpus))
    total = sum(source.weight for source in found)
    if total <= 0:
        raise EngineError(f"tokens {text!r} name no source; write self, mix, or a text file")
    return tuple(replace(s, weight=s.weight / total) for s in found if s.weight > 0)


def file_tag(text: str, file: GGUFFile) -> str:
    """Return what the name of a file made from these sources says of them, as parse_sources reads
    them: self, self_mix_2. Where texts were given, it ends in a hash of all sources.
    """
    parts = [p.strip() for p in text.split(",") if p.strip()]
    tag = "_".join(re.sub(r"[^\w.-]", "_", Path(part).name) for part in parts)
    sources = parse_sources(text, file)
    bare = {weighed["name"] if (weighed := _WEIGHT.fullmatch(p)) else p for p in parts}
    if bare <= {MIX, *TOKENS}:
        return tag
    said = [(s.kind, s.weight, s.corpus and s.corpus.identity.sha256) for s in sources]
    return f"{tag}-{hashlib.sha256(repr(said).encode()).hexdigest()[:8]}"


def of_sources(request: TokenRequest, text: str, file: GGUFFile) -> TokenRequest:
    """Return the request for tokens of the sources in a list, as parse_sources reads it."""
    sources = parse_sources(text, file)
    if len(sources) > 1:
        return replace(request, sources=sources)
    return replace(request, tokens=sources[0].kind, corpus=sources[0].corpus)


def shares(sources: Sequence[TokenSource], n: int) -> tuple[int, ...]:
    """Return how many of n sequences each source gives: its weight of n, rounded to add up to n.

    Remainders are settled by the largest; what is left over goes to the first of equals.
    """
    exact = [source.weight * n for source in sources]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def dataset_name(
    sources: Sequence[TokenSource], seed: int | None = None, stand_in: str | None = None
) -> str:
    """Return what is said of the tokens: the sources, with their weights if there are several."""
    named = [s.corpus.name if s.corpus else f"{s.kind}-drawn tokens" for s in sources]
    weights = [f" {s.weight:.0%}" if len(sources) > 1 else "" for s in sources]
    described = " + ".join(name + weight for name, weight in zip(named, weights, strict=True))
    seeded = "" if seed is None else f", seed {seed}"
    return described + seeded + (f", on a stand-in in {stand_in}" if stand_in else "")


def in_turn(sources: Sequence[TokenSource], n: int) -> list[int]:
    """Return which source gives each of the first n sequences: always the one that is furthest
    behind its weight, so that any first few are in proportion.
    """
    counts = [0] * len(sources)
    found = []
    for i in range(n):
        behind = [s.weight * (i + 1) - c for s, c in zip(sources, counts, strict=True)]
        chosen = behind.index(max(behind))
        counts[chosen] += 1
        found.append(chosen)
    return found


def draw(passes: Draws, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
    """Return the request's sequences of these numbers, from its sources in turn."""
    if not request.sources or not indices:
        return passes.draw(request, indices)
    order = in_turn(request.sources, max(indices) + 1)
    found: dict[int, TokenIds] = {}
    for number, one in enumerate(request.each_source()):
        mine = [i for i in indices if order[i] == number]
        if mine:
            own = [order[:i].count(number) for i in mine]
            found |= zip(mine, passes.draw(one, own), strict=True)
    return tuple(found[i] for i in indices)


def draw_sets(
    passes: Draws, request: TokenRequest, sizes: Sequence[int], first: int
) -> tuple[tuple[TokenIds, ...], ...]:
    """Return sets of the request's sequences, each from its sources in turn.

    No token of a text is in two sets; first is the number of the first sequence of a source.
    """
    if not request.sources:
        return passes.draw_sets(request, sizes, first)
    sets: list[list[TokenIds]] = [[] for _ in sizes]
    order = in_turn(request.sources, sum(sizes))
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    for number, one in enumerate(request.each_source()):
        own = [order[end - size : end].count(number) for end, size in zip(ends, sizes, strict=True)]
        if any(own):
            for part, drawn in zip(sets, passes.draw_sets(one, own, first), strict=True):
                part += drawn
    return tuple(map(tuple, sets))
