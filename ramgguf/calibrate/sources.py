"""What a model is calibrated on: one or several sources of tokens, with weights.

self,mix,FILE:2 reads half of the sequences from the file, a quarter from the model itself and a
quarter from the texts of the package; these stand for one source each of their domains.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ramgguf.core.corpus import Corpus
from ramgguf.core.errors import EngineError
from ramgguf.core.values import TokenKind
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.domains import domain_corpora
from ramgguf.llama.tokens import parse_tokens

MIX = "mix"
_WEIGHT = re.compile(r"(?P<name>.+?):(?P<weight>\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class TokenSource:
    """Tokens of one kind, and its weight among the others; corpus is for those of a text."""

    name: str
    weight: float
    kind: TokenKind
    corpus: Corpus | None = None


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
