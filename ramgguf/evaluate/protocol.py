"""How a protocol cuts the tokens of a text into sequences."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.result import Protocol
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.scorer import Window

RAM_N_CTX, RAM_N_SEQ, RAM_SEED = 2048, 128, 42


LLAMA_N_CTX = 512


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


@dataclass(frozen=True)
class EvalProtocol:
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
    last token falls off. When the text has fewer windows all are used, and a note says so; so does
    one where the tokenizer adds BOS and the windows have none.
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
    elif tokens.adds_bos:
        notes += ("the model expects BOS before a text, and no window has it; --bos puts it there",)
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
