"""The text that is scored, and how a protocol cuts its tokens into sequences."""

import bisect
import hashlib
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ramgguf.errors import EngineError
from ramgguf.results import Protocol, Text

TokenIds = npt.NDArray[np.int32]

DEFAULT_NAME = "wikitext-2-test"
RAM_N_CTX, RAM_N_SEQ, RAM_SEED = 2048, 128, 42
LLAMA_N_CTX = 512

# A heading of the first level, as WikiText writes it: ` = Robert Boulter = `.
_TITLE = re.compile(rb"^ = (?P<title>[^=\n][^\n]*?) = $", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A text with a name for reports."""

    name: str
    text: str

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
        found = _TITLE.finditer(self.bytes)
        return [(m.start(), m["title"].decode("utf-8", "replace").strip()) for m in found]

    def title_at(self, position: int) -> str | None:
        """Return the article that the byte at position belongs to; None in a text without any."""
        before = bisect.bisect_right(self._titles, position, key=lambda t: t[0])
        return self._titles[before - 1][1] if before else None

    def excerpt(self, start: int, end: int, n_bytes: int = 240) -> str:
        """Return the first bytes of a span as text, without half characters."""
        return self.bytes[start : min(end, start + n_bytes)].decode("utf-8", "ignore")


@dataclass(frozen=True)
class Window:
    """One sequence: its place among the windows of the text, its token ids, its span in bytes."""

    index: int
    ids: TokenIds
    text_start: int
    text_end: int


@dataclass(frozen=True)
class Windows:
    """The sequences of a protocol, in the order of the text, and what had to be said about them."""

    protocol: Protocol
    windows: tuple[Window, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """A tokenized text: ids, where each ends in its UTF-8 bytes, and the tokenizer's BOS."""

    ids: TokenIds
    ends: npt.NDArray[np.int64]
    bos: int
    adds_bos: bool


def default_corpus() -> Corpus:
    """Return the test split of WikiText-2, which comes with the package."""
    data = importlib.resources.files("ramgguf") / "data" / "wikitext2-test.txt"
    return Corpus(DEFAULT_NAME, data.read_bytes().decode("utf-8"))


def text_file(path: Path) -> Corpus:
    """Return the text of a file: UTF-8 text, or a parquet file with a column `text`.

    Raises EngineError when it cannot be read.
    """
    if path.suffix == ".parquet":
        return dataset("parquet", split="train", files=path)
    try:
        return Corpus(path.name, path.read_bytes().decode("utf-8"))
    except OSError as e:
        raise EngineError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise EngineError(f"{path}: byte {e.start} is not UTF-8; expected a text file") from None


def dataset(name: str, *, split: str, files: Path | None = None) -> Corpus:
    """Return the column `text` of a dataset: a name on the hub, or a builder with files.

    `name` may end in `:configuration`, as in wikitext:wikitext-2-raw-v1. Rows that end in newlines
    are lines and are joined as they are; other rows are documents, separated by an empty line.
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
        loaded = datasets.load_dataset(
            repository,
            configuration or None,
            split=split,
            data_files=None if files is None else str(files),
        )
    except Exception as e:  # `datasets` raises whatever its back ends raise
        raise EngineError(f"dataset {name}, split {split}: {type(e).__name__}: {e}") from None
    if "text" not in loaded.column_names:
        found = ", ".join(loaded.column_names)
        raise EngineError(f"dataset {name}: no column 'text'; it has {found}")
    label = files.name if files is not None else f"{name}/{split}"
    return Corpus(label, join_rows(loaded["text"]))


def join_rows(rows: Sequence[str]) -> str:
    """Return rows as one text: lines are joined as they are, documents by an empty line."""
    texts = [row for row in rows if row]
    return ("" if all(t.endswith("\n") for t in texts) else "\n\n").join(texts)


@dataclass(frozen=True)
class Recipe:
    """What is scored and how: the options of an evaluation that make its numbers.

    n_ctx and n_seq are by default the protocol's own: 2048 and 128 for ram, 512 and all windows
    for llama. seed and bos concern ram only; llama takes BOS from the model.
    """

    corpus: Corpus = field(default_factory=default_corpus)
    protocol: Literal["ram", "llama"] = "ram"
    n_ctx: int | None = None
    n_seq: int | None = None
    seed: int = RAM_SEED
    bos: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.n_ctx or (RAM_N_CTX if self.protocol == "ram" else LLAMA_N_CTX)

    @property
    def text(self) -> str:
        """The text as the tokenizer gets it."""
        return llama_text(self.corpus.text) if self.protocol == "llama" else self.corpus.text

    @property
    def add_special(self) -> bool:
        """Whether the tokenizer adds what it adds to a prompt."""
        return self.protocol == "llama"

    def windows(self, tokens: Tokens) -> Windows:
        """Return the sequences of the tokenized text."""
        n_ctx = self.sequence_length
        if self.protocol == "llama":
            return llama_windows(tokens, n_ctx=n_ctx, n_seq=self.n_seq)
        n_seq = self.n_seq or RAM_N_SEQ
        return ram_windows(tokens, n_ctx=n_ctx, n_seq=n_seq, seed=self.seed, bos=self.bos)


def ram_windows(
    tokens: Tokens,
    *,
    n_ctx: int = RAM_N_CTX,
    n_seq: int = RAM_N_SEQ,
    seed: int = RAM_SEED,
    bos: bool = False,
) -> Windows:
    """Return n_seq windows drawn without replacement from the text's consecutive windows.

    All tokens after the first are scored. With bos, BOS is put in front of every window and its
    last token falls off. When the text has fewer windows all are used, and a note says so.
    """
    if bos and tokens.bos < 0:
        raise EngineError("--bos: this tokenizer has no BOS token")
    n_windows = len(tokens.ids) // n_ctx
    _require_windows(n_windows, len(tokens.ids), n_ctx, 1)
    drawn = np.arange(n_windows)
    notes: tuple[str, ...] = ()
    if n_seq < n_windows:
        rng = np.random.default_rng(seed)
        drawn = np.sort(rng.choice(n_windows, size=n_seq, replace=False))
    elif n_seq > n_windows:
        notes = (
            f"the text gives {n_windows} windows of {n_ctx} tokens, not {n_seq}: all are used",
        )
    windows = tuple(_window(tokens, int(i), n_ctx) for i in drawn)
    if bos:
        head = np.array([tokens.bos], dtype=np.int32)
        windows = tuple(
            Window(w.index, np.concatenate([head, w.ids[:-1]]), w.text_start, w.text_end)
            for w in windows
        )
    protocol = Protocol(
        name="ram",
        n_ctx=n_ctx,
        n_windows=n_windows,
        n_seq=len(windows),
        n_seq_wanted=n_seq,
        seed=seed,
        bos=bos,
        first_target=1,
    )
    return Windows(protocol, windows, notes)


def llama_text(text: str) -> str:
    """Return the text as llama-perplexity reads it from a file: without one final newline."""
    return text.removesuffix("\n")


def llama_windows(tokens: Tokens, *, n_ctx: int = LLAMA_N_CTX, n_seq: int | None = None) -> Windows:
    """Return the consecutive windows that llama-perplexity scores: all, or the first n_seq.

    tokens are those of llama_text, with what the tokenizer adds to a prompt. Where it adds BOS, BOS
    takes the place of every window's first token. The last n_ctx/2 − 1 targets are scored (source:
    llama.cpp, tools/perplexity/perplexity.cpp, function perplexity).
    """
    n_windows = len(tokens.ids) // n_ctx
    _require_windows(n_windows, len(tokens.ids), n_ctx, 2)
    windows = [_window(tokens, i, n_ctx) for i in range(min(n_windows, n_seq or n_windows))]
    if tokens.adds_bos:
        for window in windows:
            window.ids[0] = tokens.bos
    protocol = Protocol(
        name="llama",
        n_ctx=n_ctx,
        n_windows=n_windows,
        n_seq=len(windows),
        n_seq_wanted=n_seq,
        seed=None,
        bos=tokens.adds_bos,
        first_target=n_ctx // 2 + 1,
    )
    return Windows(protocol, tuple(windows), ())


def _require_windows(n_windows: int, n_tokens: int, n_ctx: int, least: int) -> None:
    if n_ctx < 4:
        raise EngineError(f"a sequence of {n_ctx} tokens is too short; expected at least 4")
    if n_windows < least:
        raise EngineError(
            f"the text has {n_tokens} tokens; {least} × {n_ctx} are needed: "
            "use a longer text or shorter sequences"
        )


def _window(tokens: Tokens, index: int, n_ctx: int) -> Window:
    first, last = index * n_ctx, (index + 1) * n_ctx
    start = int(tokens.ends[first - 1]) if first else 0
    return Window(index, tokens.ids[first:last].copy(), start, int(tokens.ends[last - 1]))
