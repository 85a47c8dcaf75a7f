"""How a protocol cuts the tokens of a text into sequences."""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.errors import EngineError
from ramgguf.core.units import format_count
from ramgguf.evaluate.result import Protocol
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.scorer import Window

ProtocolName = Literal["ram", "warm", "llama"]
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
    """A tokenized text: ids, where each ends in its UTF-8 bytes, and the tokenizer's BOS.

    warm_up is what the model reads before a text: BOS, or the start of its chat template.
    """

    ids: TokenIds
    ends: npt.NDArray[np.int64]
    bos: int
    adds_bos: bool
    warm_up: tuple[int, ...] = ()


@dataclass(frozen=True)
class EvalProtocol:
    """What is scored and how: the options of an evaluation that make its numbers.

    n_ctx and n_seq are by default the protocol's own: 2048 and 128 for ram and warm, 512 and all
    windows for llama. seed concerns ram and warm, bos ram only; the others take it from the model.
    """

    corpus: Corpus = field(default_factory=default_corpus)
    protocol: ProtocolName = "ram"
    n_ctx: int | None = None
    n_seq: int | None = None
    seed: int = RAM_SEED
    bos: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.n_ctx or (LLAMA_N_CTX if self.protocol == "llama" else RAM_N_CTX)

    @property
    def is_warm(self) -> bool:
        """Whether every sequence starts with what the model reads before a text."""
        return self.protocol == "warm"

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
        if self.bos and self.protocol != "ram":
            raise EngineError(
                f"--bos is of the protocol ram; {self.protocol} takes BOS from the model"
            )
        if self.protocol == "llama":
            return llama_windows(tokens, n_ctx=n_ctx, n_seq=self.n_seq)
        n_seq = self.n_seq or RAM_N_SEQ
        if self.is_warm:
            return warm_windows(tokens, n_ctx=n_ctx, n_seq=n_seq, seed=self.seed)
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
    drawn, n_windows, notes = _drawn(tokens, n_ctx, n_seq, seed)
    windows = tuple(_window(tokens, int(i), n_ctx) for i in drawn)
    if bos:
        head = np.array([tokens.bos], dtype=np.int32)
        windows = tuple(
            replace(w, ids=np.concatenate([head, w.ids[:-1]]), ends=w.ends[:-1]) for w in windows
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


def warm_windows(
    tokens: Tokens, *, n_ctx: int = RAM_N_CTX, n_seq: int = RAM_N_SEQ, seed: int = RAM_SEED
) -> Windows:
    """Return windows drawn as ram_windows does, each after what the model reads before a text.

    The text's tokens fill what tokens.warm_up leaves of n_ctx. All of them are scored; the first
    only where something stands before it.
    """
    n_text = n_ctx - len(tokens.warm_up)
    if n_text < n_ctx / 2:
        raise EngineError(
            f"the model's chat template starts with {len(tokens.warm_up)} tokens: more than half"
            f" of a sequence of {n_ctx}; use longer sequences (--seq-len)"
        )
    drawn, n_windows, notes = _drawn(tokens, n_text, n_seq, seed)
    head = np.array(tokens.warm_up, dtype=np.int32)
    windows = tuple(
        replace(w, ids=np.concatenate([head, w.ids]))
        for w in (_window(tokens, int(i), n_text) for i in drawn)
    )
    protocol = Protocol(
        name="warm",
        n_ctx=n_ctx,
        n_windows=n_windows,
        n_seq=len(windows),
        n_seq_wanted=n_seq,
        seed=seed,
        bos=tokens.adds_bos,
        first_target=max(1, len(head)),
        n_warm_up=len(head),
    )
    if not len(head):
        notes += ("this model has neither BOS nor a chat template: its windows start cold",)
    return Windows(protocol, windows, notes)


def _drawn(
    tokens: Tokens, n_text: int, n_seq: int, seed: int
) -> tuple[npt.NDArray[np.int64], int, tuple[str, ...]]:
    """Return which windows of n_text tokens are drawn, of how many, and what is to be said."""
    n_windows = len(tokens.ids) // n_text
    _require_windows(n_windows, len(tokens.ids), n_text, 1)
    if n_seq < n_windows:
        rng = np.random.default_rng(seed)
        return np.sort(rng.choice(n_windows, size=n_seq, replace=False)), n_windows, ()
    note = (
        f"the text gives {format_count(n_windows, 'window')} of {n_text} tokens, not {n_seq}: all "
        "are used"
    )
    return np.arange(n_windows), n_windows, (note,) if n_seq > n_windows else ()


def llama_text(text: str) -> str:
    """Return the text as llama-perplexity reads it from a file: without one final newline."""
    return text.removesuffix("\n")


def llama_windows(
    tokens: Tokens, *, n_ctx: int = LLAMA_N_CTX, n_seq: int | None = None, n_least: int = 2
) -> Windows:
    """Return the consecutive windows that llama-perplexity scores: all, or the first n_seq.

    tokens are those of llama_text, with what the tokenizer adds to a prompt. Where it adds BOS, BOS
    takes the place of every window's first token. The last n_ctx/2 − 1 targets are scored (source:
    llama.cpp, tools/perplexity/perplexity.cpp, function perplexity). A text of fewer than n_least
    windows is too short.
    """
    n_windows = len(tokens.ids) // n_ctx
    _require_windows(n_windows, len(tokens.ids), n_ctx, n_least)
    windows = [_window(tokens, i, n_ctx) for i in range(min(n_windows, n_seq or n_windows))]
    if tokens.adds_bos:
        windows = [replace(w, ends=w.ends[1:]) for w in windows]
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
            f"the text has {format_count(n_tokens, 'token')}; {least} × {n_ctx} are needed: use a "
            "longer text or shorter sequences"
        )


def _window(tokens: Tokens, index: int, n_ctx: int) -> Window:
    first, last = index * n_ctx, (index + 1) * n_ctx
    start = int(tokens.ends[first - 1]) if first else 0
    ends = tokens.ends[first:last]
    return Window(index, tokens.ids[first:last].copy(), start, int(ends[-1]), ends)
