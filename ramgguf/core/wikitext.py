"""WikiText-2's test split: its canonical file, and copies whose blank lines are others.

Perplexities in papers and of llama-perplexity are of `wiki.test.raw`: 4,358 lines, of which 1,467
hold a space alone. The package's copy has none of these, so its PPL is another one's.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from ramgguf.core.corpus import Corpus, default_corpus

# wiki.test.raw in wikitext-2-raw-v1.zip (huggingface.co/datasets/ggml-org/ci), 1,290,590 bytes.
CANONICAL_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"

BUNDLED_NOTE = (
    "This text is WikiText-2 without its blank lines (2,891 of wiki.test.raw's 4,358 lines): its"
    " PPL compares with no published value. `--text wiki.test.raw` gives those"
)
CANONICAL_NOTE = (
    "This text is the canonical wiki.test.raw: with the protocol llama, corpus PPL is what"
    " llama-perplexity prints for the same -c"
)
OTHER_NOTE = (
    "This text is WikiText-2 with other blank lines than wiki.test.raw: its PPL compares with no"
    " published value"
)


def is_canonical(corpus: Corpus) -> bool:
    """Return whether the text is wiki.test.raw, to the byte."""
    return corpus.identity.sha256 == CANONICAL_SHA256


def note_of(corpus: Corpus) -> str | None:
    """Return what is to be said of a perplexity of this text; None for other texts."""
    if is_canonical(corpus):
        return CANONICAL_NOTE
    if corpus.bytes == default_corpus().bytes:
        return BUNDLED_NOTE
    if _lines_sha256(corpus.bytes) == _bundled_lines_sha256():
        return OTHER_NOTE
    return None


def from_rows(rows: Sequence[str]) -> str | None:
    """Return wiki.test.raw of a dataset's rows, which has "" for a blank line; None for others."""
    text = "".join(row or " \n" for row in rows)
    found = hashlib.sha256(text.encode()).hexdigest()
    return text if found == CANONICAL_SHA256 else None


def _lines_sha256(text: bytes) -> str:
    """Return a hash of the lines that are not blank, without spaces at their ends."""
    lines = [line.strip() for line in text.splitlines()]
    return hashlib.sha256(b"\n".join(filter(None, lines))).hexdigest()


@lru_cache(maxsize=1)
def _bundled_lines_sha256() -> str:
    return _lines_sha256(default_corpus().bytes)
