"""Files of llama-perplexity's `--kl-divergence-base`: a reference's probabilities, 16 bits each.

    "_logits_"            8 bytes
    n_ctx                 int32; tokens of a window
    n_vocab, n_windows    int32 each
    tokens                int32[n_windows][n_ctx]; of the text, BOS is not put in their place
    rows                  [n_windows][n_ctx − 1 − n_ctx/2], for positions n_ctx/2 … n_ctx − 2:
        scale, lowest     float32 each
        steps             uint16[n_vocab], and one more where n_vocab is odd

log p(i) = lowest + scale · steps[i]. No log p is more than 16 nats below the row's largest one.
All numbers are little-endian. Source: llama.cpp, tools/perplexity/perplexity.cpp (functions
log_softmax, process_logits, perplexity, kl_divergence).

A file whose rows start elsewhere is ours alone: "_ramrow_" in place of "_logits_", and after
n_windows one more int32, the position of a window's first row.

Rows are read where they lie in the file: a reference need not fit in memory.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ramgguf.core.errors import EngineError
from ramgguf.core.files import refuse_input
from ramgguf.core.inputs import reading
from ramgguf.core.units import format_count

TokenIds = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

MAGIC = b"_logits_"
_HEADER = struct.Struct("<8s3i")
_OWN_MAGIC = b"_ramrow_"
_OWN_HEADER = struct.Struct("<8s4i")
_REACH = np.float32(16)  # nats below the largest logit that steps reach
_STEPS = np.float32(65535)
LEAST_LOG_P = np.float32(-16)  # what is less probable is left out of the KLD
_SLICE = 32  # rows that are packed at a time: they stay in the cache


@dataclass(frozen=True)
class Layout:
    """Sizes of a file: windows of n_ctx tokens, of a vocabulary of n_vocab.

    own_first_row is the position of a window's first row in a file of ours; None in llama.cpp's.
    """

    n_ctx: int
    n_vocab: int
    n_windows: int
    own_first_row: int | None = None

    @property
    def header(self) -> bytes:
        """What the file starts with."""
        sizes = self.n_ctx, self.n_vocab, self.n_windows
        if self.own_first_row is None:
            return _HEADER.pack(MAGIC, *sizes)
        return _OWN_HEADER.pack(_OWN_MAGIC, *sizes, self.own_first_row)

    @property
    def first_row(self) -> int:
        """The position in a window whose row comes first."""
        return self.n_ctx // 2 if self.own_first_row is None else self.own_first_row

    @property
    def n_rows(self) -> int:
        """Rows of a window."""
        return self.n_ctx - 1 - self.first_row

    @property
    def row_words(self) -> int:
        """Two-byte words of a row."""
        return 2 * ((self.n_vocab + 1) // 2) + 4

    @property
    def rows_at(self) -> int:
        """Where in the file the rows start."""
        return len(self.header) + 4 * self.n_windows * self.n_ctx

    @property
    def n_bytes(self) -> int:
        """Bytes of the file."""
        return self.rows_at + 2 * self.n_windows * self.n_rows * self.row_words


def pack_rows(logits: Floats) -> npt.NDArray[np.uint16]:
    """Return rows (n, n_vocab) of logits as the file has them: (n, words of a row).

    The steps are those of llama.cpp where it sums exp in the same order. Raises EngineError where a
    logit is NaN or infinite.
    """
    n, n_vocab = logits.shape
    packed = np.zeros((n, Layout(4, n_vocab, 1).row_words), np.uint16)
    for start in range(0, n, _SLICE):
        _pack(logits[start : start + _SLICE], packed[start : start + _SLICE])
    return packed


def _pack(x: Floats, packed: npt.NDArray[np.uint16]) -> None:
    top, low = x.max(axis=1), x.min(axis=1)
    if not (np.isfinite(top).all() and np.isfinite(low).all()):
        raise EngineError("logits that are NaN or infinite cannot be a reference's")
    low = np.maximum(low, top - _REACH)
    sums = np.exp(x - top[:, None]).sum(axis=1, dtype=np.float64)
    scale = (top - low) / _STEPS
    inverse = np.divide(np.float32(1), scale, where=scale > 0, out=np.zeros_like(scale))
    steps = np.rint((x - low[:, None]) * inverse[:, None])
    head = np.empty((len(x), 2), "<f4")
    head[:, 0], head[:, 1] = scale, low - top - np.log(sums).astype(np.float32)
    packed[:, :4] = head.view("<u2")
    packed[:, 4 : 4 + x.shape[1]] = np.clip(steps, 0, _STEPS)


class LogitsFile:
    """A file that is open for reading. Raises EngineError where it is none, or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_OWN_HEADER.size)
        except OSError as e:
            raise EngineError(f"{path}: {e.strerror or e}") from None
        if len(head) == _OWN_HEADER.size and head.startswith(_OWN_MAGIC):
            sizes = _OWN_HEADER.unpack(head)[1:]
        elif len(head) >= _HEADER.size and head.startswith(MAGIC):
            sizes = _HEADER.unpack(head[: _HEADER.size])[1:]
        else:
            raise EngineError(
                f"{path} starts with {head[:8]!r}, expected {MAGIC!r}: it is no file of "
                "llama-perplexity --kl-divergence-base or eval --save-logits"
            )
        self.layout = Layout(*sizes)
        is_within = 0 <= self.layout.first_row < self.layout.n_ctx - 1
        if min(sizes[1:3]) < 1 or self.layout.n_ctx < 4 or not is_within:
            raise EngineError(f"{path}: {self.layout} makes no sense; was it damaged?")
        if size < self.layout.n_bytes:
            raise EngineError(
                f"{path} has {size} bytes, {self.layout.n_bytes} are expected for "
                f"{format_count(self.layout.n_windows, 'window')}: it was cut short; make it again"
            )
        reading(path)
        tokens = self.tokens
        strange = np.flatnonzero((tokens < 0) | (tokens >= self.layout.n_vocab))
        if len(strange):
            raise EngineError(
                f"{path} is damaged: token {strange[0]} of its text is {tokens[strange[0]]}, "
                f"expected 0 … {self.layout.n_vocab - 1}; make it again"
            )
        self._rows = _rows_of(path, self.layout)

    @property
    def tokens(self) -> TokenIds:
        """The text's token ids, one window after the other."""
        n = self.layout.n_windows * self.layout.n_ctx
        start = len(self.layout.header)
        return np.fromfile(self.path, "<i4", n, offset=start).astype(np.int32)

    def log_probabilities(self, window: int, first: int, last: int) -> Floats:
        """Return log p, in nats, for positions first … last − 1 of a window: (n, n_vocab)."""
        start = self.layout.first_row
        packed = self._rows[window, first - start : last - start]
        head = np.ascontiguousarray(packed[:, :4]).view("<f4")
        found = packed[:, 4 : 4 + self.layout.n_vocab].astype(np.float32)
        found *= head[:, :1]
        found += head[:, 1:2]
        return found


class LogitsWriter:
    """Writes rows into FILE.part, which becomes FILE when all are there. A context manager.

    With resume, windows that are whole in FILE.part are kept. Raises EngineError where FILE exists.
    """

    def __init__(self, path: Path, layout: Layout, tokens: TokenIds, *, resume: bool) -> None:
        self.path, self.layout = path, layout
        self.part = part_of(path)
        if path.exists():
            raise EngineError(f"{path} exists; choose another name, or remove it")
        refuse_input(self.part, error=EngineError)
        head = layout.header + tokens.astype("<i4").tobytes()
        try:
            if not (resume and self._continues(head)):
                with self.part.open("wb") as file:
                    file.write(head)
                    file.truncate(layout.n_bytes)
            self._rows = _rows_of(self.part, layout)
        except OSError as e:
            raise EngineError(f"{self.part}: {e.strerror or e}") from None

    def _continues(self, head: bytes) -> bool:
        if not self.part.exists() or self.part.stat().st_size != self.layout.n_bytes:
            return False
        with self.part.open("rb") as file:
            return file.read(len(head)) == head

    def has(self, window: int) -> bool:
        """Return whether the window's rows are all written; a row's lowest log p is never 0."""
        return bool(self._rows[window, :, :4].any(axis=1).all())

    def finish(self) -> None:
        """Give the file its name. Raises EngineError when rows are missing."""
        missing = sum(not self.has(i) for i in range(self.layout.n_windows))
        if missing:
            raise EngineError(
                f"{self.part} lacks {missing} of {format_count(self.layout.n_windows, 'window')}; "
                "--resume goes on"
            )
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.rename(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._rows


def part_of(path: Path) -> Path:
    """Return where a file is until it is whole."""
    return path.with_name(path.name + ".part")


def write_rows(file: LogitsFile, window: int, first: int, logits: Floats) -> None:
    """Write the logits (n, n_vocab) of a window's positions from first on into the file.

    Raises EngineError where they have NaN or infinity, or the file cannot be written.
    """
    layout = file.layout
    row = window * layout.n_rows + first - layout.first_row
    packed = pack_rows(logits).astype("<u2", copy=False)
    try:
        with file.path.open("rb+") as out:
            out.seek(layout.rows_at + 2 * row * layout.row_words)
            out.write(packed.tobytes())
    except OSError as e:
        raise EngineError(f"{file.path}: {e.strerror or e}") from None


def _rows_of(path: Path, layout: Layout) -> npt.NDArray[np.uint16]:
    """Return the rows where they lie in the file: (windows, rows, words)."""
    shape = layout.n_windows, layout.n_rows, layout.row_words
    return np.memmap(path, "<u2", "r", offset=layout.rows_at, shape=shape)
