"""The texts that `eval --corpus` scores: the package's domains, long windows, and files."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.corpus import Corpus, default_corpus, text_file
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.domains import domain_corpora

# Names of domains, and what the package's texts (core/mix.py) call them.
DOMAINS = {
    "prose": "prose",
    "code": "code",
    "math": "mathematics",
    "chat": "chat",
    "multilingual": "languages",
}
WIKITEXT, LONG = "wikitext", "long"
NAMES = (*DOMAINS, LONG, WIKITEXT)
DOMAIN_N_CTX, LONG_N_CTX = 512, 8192


@dataclass(frozen=True)
class ScoredText:
    """A text, and the tokens per sequence that suit it; None: the protocol's own."""

    corpus: Corpus
    n_ctx: int | None = None


def scored_texts(names: Sequence[str], model: Path) -> tuple[ScoredText, ...]:
    """Return the texts of these names; what is none of NAMES is a file.

    Domains are parts of the package's texts that nothing is calibrated on; chats are in the
    template of the model. Raises EngineError for names of nothing, and for one given twice.
    """
    if len(set(names)) < len(names):
        raise EngineError(f"--corpus {','.join(names)}: a text is given twice")
    domains: dict[str, Corpus] = {}
    if any(name in DOMAINS for name in names):
        with open_gguf(model) as file:
            domains = domain_corpora(file, "score", "gate")
    return tuple(_text(name, domains) for name in names)


def refuse_equal(texts: Sequence[ScoredText], lengths: Sequence[int | None]) -> None:
    """Raise EngineError where one text would be read twice in sequences of one length.

    Results have no other key than text and length: a model would be compared with itself.
    """
    seen: dict[tuple[str, int | None], str] = {}
    for each, length in itertools.product(texts, lengths):
        text = each.corpus.identity
        key = text.sha256, length or each.n_ctx
        if key in seen:
            names = " and ".join(dict.fromkeys((seen[key], text.name)))
            raise EngineError(f"{names}: one text, twice in sequences of one length; give it once")
        seen[key] = text.name


def _text(name: str, domains: dict[str, Corpus]) -> ScoredText:
    if name in DOMAINS:
        found = domains[DOMAINS[name]]
        corpus = Corpus(name, found.text, found.has_control_tokens, found.documents)
        return ScoredText(corpus, DOMAIN_N_CTX)
    if name == LONG:
        return ScoredText(Corpus(LONG, default_corpus().text), LONG_N_CTX)
    if name == WIKITEXT:
        return ScoredText(default_corpus())
    path = Path(name)
    if not path.is_file():
        raise EngineError(f"--corpus {name!r} is none of {', '.join(NAMES)}, and no file")
    return ScoredText(text_file(path))
