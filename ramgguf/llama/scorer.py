"""Models loaded together that score sequences: what is asked of them, and an engine that does."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import Opened, Scored, TokenIds


@dataclass(frozen=True)
class Window:
    """One sequence: its place among the windows of the text, its token ids, its span in bytes.

    ends is where each of its last len(ends) tokens ends in the text's bytes; the tokens before
    these are no text (BOS, the start of a chat template).
    """

    index: int
    ids: TokenIds
    text_start: int
    text_end: int
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class EngineOptions:
    """How models are loaded, as in Engine; numbers are the same where these are."""

    n_ctx: int
    n_threads: int
    safe_kernels: bool
    verbose: bool


@dataclass(frozen=True)
class LogitsFiles:
    """Files of logits (logits_file.py): a reference's to compare with, one for the first model's"""

    reference: str | None = None
    save: str | None = None


NO_FILES = LogitsFiles()


@dataclass(frozen=True)
class WindowScores:
    """A window, each model's scores of it, and the name of the CPU that computed them."""

    window: Window
    scored: Sequence[Scored]
    cpu: str


class Scorer(Protocol):
    """Models loaded together, in an engine here or on workers."""

    @property
    def opened(self) -> Opened:
        """What is loaded, and by which llama.cpp."""

    def tokenize(
        self, text: str, *, add_special: bool, control_tokens: bool = False
    ) -> tuple[TokenIds, NDArray[np.int64]]:
        """Return the text's token ids and where each ends in its UTF-8 bytes."""

    def detokenize(self, ids: TokenIds) -> tuple[bytes, NDArray[np.int64]]:
        """Return the text of the first model's tokens and where each ends in it."""

    def score(
        self,
        windows: Sequence[Window],
        first_target: int,
        *,
        has_reference: bool,
        logits: LogitsFiles = NO_FILES,
    ) -> Iterator[WindowScores]:
        """Yield the windows' scores in any order, as they are computed."""


class EngineScorer:
    """Models loaded in one engine, which scores one window after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def opened(self) -> Opened:
        """What is loaded."""
        return self._engine.opened

    def tokenize(
        self, text: str, *, add_special: bool, control_tokens: bool = False
    ) -> tuple[TokenIds, NDArray[np.int64]]:
        """Return the text's token ids and where each ends in its UTF-8 bytes."""
        return self._engine.tokenize(text, add_special=add_special, control_tokens=control_tokens)

    def detokenize(self, ids: TokenIds) -> tuple[bytes, NDArray[np.int64]]:
        """Return the text of the first model's tokens and where each ends in it."""
        return self._engine.detokenize(ids)

    def score(
        self,
        windows: Sequence[Window],
        first_target: int,
        *,
        has_reference: bool,
        logits: LogitsFiles = NO_FILES,
    ) -> Iterator[WindowScores]:
        """Yield the windows' scores in their order."""
        for w in windows:
            scored = self._engine.score(
                w.index,
                w.ids,
                first_target,
                has_reference=has_reference,
                reference_logits=logits.reference,
                save_logits=logits.save,
            )
            yield WindowScores(w, list(scored), self.opened.system.cpu)
