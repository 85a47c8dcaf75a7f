"""The texts of several domains that come with the package, in parts that do not overlap.

A model is calibrated on one part, choices are gated on another, and what was written is scored on
the third: no source file serves two parts. Sources and licences: data/MIX-LICENSES.md.
"""

import importlib.resources
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Part = Literal["calibrate", "gate", "score"]


@dataclass(frozen=True)
class Turn:
    """What one side says in a chat; role is user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """An excerpt of one source: a text, or the turns of a chat."""

    domain: str
    part: Part
    source: str
    licence: str
    text: str = ""
    turns: tuple[Turn, ...] = ()


@lru_cache(maxsize=1)
def documents() -> tuple[Document, ...]:
    """Return all documents, in the file's order."""
    data = importlib.resources.files("ramgguf.core") / "data" / "mix.ndjson"
    found = []
    for line in data.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        turns = tuple(Turn(**turn) for turn in fields.pop("turns", ()))
        found.append(Document(**fields, turns=turns))
    return tuple(found)


def by_domain(part: Part) -> dict[str, tuple[Document, ...]]:
    """Return the documents of a part, by domain, in the file's order."""
    found: dict[str, tuple[Document, ...]] = {}
    for document in documents():
        if document.part == part:
            found[document.domain] = (*found.get(document.domain, ()), document)
    return found
