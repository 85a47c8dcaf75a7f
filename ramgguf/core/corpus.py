"""The text that is scored, and how a protocol cuts its tokens into sequences."""

import bisect
import hashlib
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ramgguf.core.documents import FrozenModel, Positive
from ramgguf.core.errors import EngineError
from ramgguf.core.inputs import read_text, reading


class Text(FrozenModel):
    """Which text was scored; sha256 is of its UTF-8 bytes."""

    name: str
    n_bytes: Positive
    sha256: str


TokenIds = npt.NDArray[np.int32]

DEFAULT_NAME = "wikitext-2-test"

# A heading of the first level, as WikiText writes it: ` = Robert Boulter = `.
_TITLE = re.compile(rb"^ = (?P<title>[^=\n][^\n]*?) = $", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A text with a name for reports.

    has_control_tokens says that control tokens written in it (<|im_start|>) stand for themselves,
    as in a chat that a template rendered; elsewhere they are text like any other. documents are
    where in its bytes each document starts, and its name; WikiText's headings say it themselves.
    """

    name: str
    text: str
    has_control_tokens: bool = False
    documents: tuple[tuple[int, str], ...] = ()

    @cached_property
    def bytes(self) -> bytes:
        """The text as UTF-8, to which all positions refer."""
        return self.text.encode()

    @property
    def identity(self) -> Text:
        """Name, size and hash, for results."""
        return Text(
            name=self.name,
            n_bytes=len(self.bytes),
            sha256=hashlib.sha256(self.bytes).hexdigest(),
        )

    @cached_property
    def _titles(self) -> list[tuple[int, str]]:
        if self.documents:
            return list(self.documents)
        found = _TITLE.finditer(self.bytes)
        return [(m.start(), m["title"].decode("utf-8", "replace").strip()) for m in found]

    def title_at(self, position: int) -> str | None:
        """Return the article that the byte at position belongs to; None in a text without any."""
        before = bisect.bisect_right(self._titles, position, key=lambda t: t[0])
        return self._titles[before - 1][1] if before else None

    def excerpt(self, start: int, end: int, n_bytes: int = 240) -> str:
        """Return the first bytes of a span as text, without half characters."""
        return self.bytes[start : min(end, start + n_bytes)].decode("utf-8", "ignore")


def default_corpus() -> Corpus:
    """Return the test split of WikiText-2, which comes with the package."""
    data = importlib.resources.files("ramgguf.core") / "data" / "wikitext2-test.txt"
    return Corpus(DEFAULT_NAME, data.read_bytes().decode("utf-8"))


def text_file(path: Path) -> Corpus:
    """Return the text of a file: UTF-8 text, or a parquet file with a column `text`.

    Raises EngineError when it cannot be read.
    """
    if path.suffix == ".parquet":
        reading(path)
        return dataset("parquet", split="train", files=path)
    return Corpus(path.name, read_text(path, error=EngineError))


def dataset(name: str, *, split: str, files: Path | None = None) -> Corpus:
    """Return the column `text` of a dataset: a name on the hub, or a builder with files.

    `name` may end in `:configuration`, as in wikitext:wikitext-2-raw-v1. Rows that end in newlines
    are lines and are joined as they are; other rows are documents, separated by an empty line.
    Raises EngineError when `datasets` is missing or the data cannot be loaded.
    """
    loaded = load_dataset(name, split=split, files=files)
    if "text" not in loaded.column_names:
        found = ", ".join(loaded.column_names)
        raise EngineError(f"dataset {name}: no column 'text'; it has {found}")
    label = files.name if files is not None else f"{name}/{split}"
    from ramgguf.core.wikitext import from_rows  # that module needs this one

    return Corpus(label, from_rows(loaded["text"]) or join_rows(loaded["text"]))


def load_dataset(name: str, *, split: str, files: Path | None = None) -> Any:
    """Return a dataset's split as `datasets` has it; name and files are as in `dataset`.

    Raises EngineError when `datasets` is missing or the data cannot be loaded.
    """
    try:
        import datasets
    except ImportError as e:
        raise EngineError(
            f"datasets cannot be imported ({e}); pip install 'ramgguf[eval]'"
        ) from None
    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(
            repository,
            configuration or None,
            split=split,
            data_files=None if files is None else str(files),
        )
    except Exception as e:  # `datasets` raises whatever its back ends raise
        raise EngineError(f"dataset {name}, split {split}: {type(e).__name__}: {e}") from None


def join_rows(rows: Sequence[str]) -> str:
    """Return rows as one text: lines are joined as they are, documents by an empty line."""
    texts = [row for row in rows if row]
    return ("" if all(t.endswith("\n") for t in texts) else "\n\n").join(texts)
