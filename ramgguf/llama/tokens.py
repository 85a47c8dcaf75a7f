"""Tokens for calibration and sensitivity: the model's own, random ones, or a text's."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from ramgguf.core.corpus import Corpus, default_corpus, text_file
from ramgguf.core.errors import EngineError
from ramgguf.core.units import format_count
from ramgguf.core.values import TokenKind
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import Draw, TokenIds
from ramgguf.llama.sampling import Begun, Steps, draw_together, most_together
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import Imatrix

N_CTX = 512
TOGETHER = 64  # sequences that a model draws side by side, where the memory allows


@dataclass(frozen=True)
class TokenSource:
    """Tokens of one kind, and its weight among the others; corpus is for those of a text."""

    name: str
    weight: float
    kind: TokenKind
    corpus: Corpus | None = None


@dataclass(frozen=True)
class TokenRequest:
    """What is wanted. n_sequences None lets the time decide; corpus is for tokens of kind text.

    sources, where there are several, are in place of tokens and corpus (sources.draw).
    imatrix weighs the encoder's errors, as it will those of the quantized model. stand_in is the
    format of the stand-in that passes run on, None for the model itself.
    """

    encoder: EncoderName
    tokens: TokenKind = "self"
    corpus: Corpus | None = None
    n_sequences: int | None = None
    n_ctx: int = N_CTX
    seed: int = 0
    seconds: float = 1200.0
    imatrix: Imatrix | None = None
    stand_in: str | None = None
    sources: tuple[TokenSource, ...] = ()

    def __post_init__(self) -> None:
        if self.n_ctx < 2:
            raise EngineError(f"sequences of {self.n_ctx} tokens predict nothing; 2 is the least")
        if self.n_sequences is not None and self.n_sequences < 1:
            raise EngineError(f"{self.n_sequences} sequences cannot be read; 1 is the least")

    def each_source(self) -> Iterator["TokenRequest"]:
        """Yield the request for tokens of each source alone."""
        for source in self.sources:
            yield replace(self, tokens=source.kind, corpus=source.corpus, sources=())

    @property
    def self_share(self) -> float:
        """The share of the sequences that the model draws itself."""
        if not self.sources:
            return float(self.tokens == "self")
        return sum(source.weight for source in self.sources if source.kind == "self")


class KeptDraw(Protocol):
    """What an earlier run drew of a request, and who keeps what this one draws."""

    def together(self, most: int) -> int:
        """Return how many sequences are drawn at a time."""

    def batch(self) -> list[TokenIds] | None:
        """Return the next batch, if it was complete."""

    def begun(self) -> Begun | None:
        """Return the steps of the next batch that were done."""

    def step(self, steps: Steps) -> None:
        """Keep these, if it is time."""


TOKENS = ("self", "random", "wikitext")  # that need no file


def parse_tokens(text: str) -> tuple[TokenKind, Corpus | None]:
    """Return what self, random, wikitext or a text file's name stands for.

    Raises EngineError when it is none of these.
    """
    if text == "self":
        return "self", None
    if text == "random":
        return "random", None
    if text == "wikitext":
        return "text", default_corpus()
    path = Path(text)
    if not path.exists():
        raise EngineError(f"tokens {text!r} are none of self, mix, random, wikitext, and no file")
    return "text", text_file(path)


def wanted_by(message: Draw) -> TokenRequest:
    """Return which tokens a message asks for."""
    return TokenRequest(
        encoder="rtn",
        tokens=message.tokens,
        corpus=None
        if message.text is None
        else Corpus(message.name, message.text, message.control_tokens),
        n_ctx=message.n_ctx,
        seed=message.seed,
    )


def batches(indices: Iterable[int], most: int = TOGETHER) -> list[tuple[int, ...]]:
    """Return the numbers of sequences in the batches in which they are drawn, wherever that is.

    There are as few batches as batches of at most `most` can be, all of about one size.
    """
    numbers = tuple(indices)
    if not numbers:
        return []
    n_batches = -(-len(numbers) // most)
    ends = [len(numbers) * i // n_batches for i in range(n_batches + 1)]
    return [numbers[start:end] for start, end in pairwise(ends)]


def draw_sequences(
    model: LlamaModel, request: TokenRequest, indices: Iterable[int]
) -> tuple[TokenIds, ...]:
    """Return the sequences of these numbers: request.n_ctx token ids each, by seed and number.

    The model's own are drawn side by side, in batches, and depend on their batch, and so on the
    memory where there is too little for TOGETHER. Raises EngineError when a text is too short, or
    missing.
    """
    return tuple(ids for batch in drawn_together(model, request, indices) for ids in batch)


def drawn_together(
    model: LlamaModel,
    request: TokenRequest,
    indices: Iterable[int],
    *,
    tap: Tap | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    kept: KeptDraw | None = None,
) -> Iterator[list[TokenIds]]:
    """Yield the sequences as draw_sequences does, batch by batch.

    A tap takes the inputs of the weights, if tokens are of kind self: no others are decoded here.
    on_step gets the number of tokens that a step of the model drew. kept has what an earlier run
    drew, and gets the steps.
    """
    numbers = tuple(indices)
    most = TOGETHER
    if request.tokens == "self" and len(numbers) > 1:
        most = most_together(model, request.n_ctx, TOGETHER)
    if kept is not None:
        most = kept.together(most)
    for batch in batches(numbers, most):
        done = kept.batch() if kept is not None else None
        yield done or list(_draw_batch(model, request, batch, tap, on_step, kept))


def _draw_batch(
    model: LlamaModel,
    request: TokenRequest,
    batch: Sequence[int],
    tap: Tap | None,
    on_step: Callable[[int], None],
    kept: KeptDraw | None,
) -> Iterator[TokenIds]:
    bos, n_vocab, length = model.vocab.info.bos, model.vocab.n_tokens, request.n_ctx - 1
    rngs = [np.random.default_rng([request.seed, index]) for index in batch]
    firsts = [bos if bos >= 0 else int(rng.integers(n_vocab)) for rng in rngs]
    rest: Iterable[TokenIds]
    if request.tokens == "random":
        rest = [rng.integers(n_vocab, size=length, dtype=np.int32) for rng in rngs]
    elif request.tokens == "text":
        rest = _text_tokens(model, request, batch, rngs)
    elif len(batch) == 1 and tap is None:
        rest = [model.sample(firsts, length, rngs[0])]
    else:
        rest = draw_together(
            model, firsts, length, rngs, tap=tap, on_step=lambda: on_step(len(batch)),
            begun=kept.begun() if kept is not None else None,
            keep=kept.step if kept is not None else lambda _: None,
        )  # fmt: skip
    for first, ids in zip(firsts, rest, strict=True):
        yield np.concatenate([np.array([first], np.int32), ids])


def draw_sets(
    model: LlamaModel, request: TokenRequest, sizes: Sequence[int], first: int
) -> tuple[tuple[TokenIds, ...], ...]:
    """Return sets of sequences, sizes[k] in the k-th; no token of a text is in two of them.

    first is the number of the first sequence: sequences of other numbers are drawn independently.
    Raises EngineError when a text is too short.
    """
    n = sum(sizes)
    if request.tokens == "text":
        drawn = _windows(model, request, n, first)
    else:
        drawn = draw_sequences(model, request, range(first, first + n))
    ends = np.cumsum(sizes)
    return tuple(drawn[end - size : end] for end, size in zip(ends, sizes, strict=True))


def _windows(model: LlamaModel, request: TokenRequest, n: int, first: int) -> tuple[TokenIds, ...]:
    """Return n windows of the text that do not overlap, each after BOS where there is one."""
    rng = np.random.default_rng([request.seed, first])
    bos, length = model.vocab.info.bos, request.n_ctx - 1
    ids = _text_ids(model, request, n * length)
    places = np.sort(rng.choice(len(ids) // length, n, replace=False))
    rng.shuffle(places)
    head = np.array([max(bos, 0)], np.int32)
    return tuple(np.concatenate([head, ids[p * length : (p + 1) * length]]) for p in places)


def _text_tokens(
    model: LlamaModel,
    request: TokenRequest,
    indices: Sequence[int],
    rngs: Sequence[np.random.Generator],
) -> Iterator[TokenIds]:
    """Yield a window of the text for every number.

    The first numbers have the text's windows in an order that the seed draws, none of which
    overlap; when these are used up, a window starts where the number's own generator says.
    """
    length = request.n_ctx - 1
    ids = _text_ids(model, request, length)
    places = np.random.default_rng(request.seed).permutation(len(ids) // length) * length
    for index, rng in zip(indices, rngs, strict=True):
        start = int(rng.integers(len(ids) - length + 1))
        if index < len(places):
            start = int(places[index])
        yield ids[start : start + length]


def _text_ids(model: LlamaModel, request: TokenRequest, n_least: int) -> TokenIds:
    """Return the text's tokens; raises EngineError when there are fewer than n_least."""
    if request.corpus is None:
        raise EngineError("tokens of kind text need a text")
    ids = model.vocab.tokenize(
        request.corpus.bytes,
        add_special=False,
        control_tokens=request.corpus.has_control_tokens,
    )
    if len(ids) < n_least:
        raise EngineError(
            f"{request.corpus.name} has {format_count(len(ids), 'token')}, {n_least} are needed; "
            "give a longer text"
        )
    return ids
