"""The package's texts: no part overlaps another, and every document names source and licence."""

from pathlib import Path

import ramgguf.core
from ramgguf.core.corpus import default_corpus
from ramgguf.core.mix import Document, Part, by_domain, documents

PARTS: tuple[Part, ...] = ("calibrate", "gate", "score")


def _text(document: Document) -> str:
    return document.text or "\n".join(turn.content for turn in document.turns)


def test_every_domain_has_text_in_every_part() -> None:
    domains = {d.domain for d in documents()}
    assert domains == {"prose", "code", "mathematics", "chat", "languages"}
    for part in PARTS:
        sizes = {d: sum(len(_text(x)) for x in found) for d, found in by_domain(part).items()}
        assert set(sizes) == domains
        assert min(sizes.values()) > 9000, sizes


def test_no_passage_of_one_part_is_in_another_nor_in_the_text_that_eval_scores() -> None:
    # Every 120 characters of the held-out parts are looked for in the others.
    whole = {part: "\n".join(_text(d) for d in documents() if d.part == part) for part in PARTS}
    licence = ("opyright", "icense", "MIT")
    others: dict[Part, str] = {
        "gate": whole["calibrate"] + default_corpus().text,
        "score": whole["calibrate"] + whole["gate"] + default_corpus().text,
    }
    for part, other in others.items():
        text = whole[part]
        for start in range(0, len(text) - 120, 40):
            passage = text[start : start + 120]
            if len(set(passage)) > 12 and not any(word in passage for word in licence):
                assert passage not in other, (part, passage)


def test_every_licence_is_explained() -> None:
    text = (Path(ramgguf.core.__file__).parent / "data" / "MIX-LICENSES.md").read_text()
    for document in documents():
        assert document.source
        for licence in document.licence.split(" OR "):
            assert licence in text, licence
