"""The tokens with which a model's sensitivity is measured: its own, random ones, or a text's."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ramgguf.corpus import Corpus
from ramgguf.engine.llama import LlamaModel
from ramgguf.engine.wire import TokenIds
from ramgguf.errors import EngineError
from ramgguf.imatrix import Imatrix
from ramgguf.schema import Encoder
from ramgguf.sensitivities import TokenKind

N_CTX = 512


@dataclass(frozen=True)
class Request:
    """What is wanted. n_sequences None lets the time decide; corpus is for tokens of kind text.

    imatrix weighs the encoder and its errors.
    """

    encoder: Encoder
    tokens: TokenKind = "self"
    corpus: Corpus | None = None
    n_sequences: int | None = None
    n_ctx: int = N_CTX
    seed: int = 0
    seconds: float = 1200.0
    imatrix: Imatrix | None = None


def draw_sequences(
    model: LlamaModel, request: Request, indices: Iterable[int]
) -> tuple[TokenIds, ...]:
    """Return the sequences of these numbers: request.n_ctx token ids each, told by seed and number.

    Raises EngineError when a text is too short, or missing.
    """
    drawn = []
    bos, n_vocab = model.vocab.info.bos, model.vocab.n_tokens
    for index in indices:
        rng = np.random.default_rng([request.seed, index])
        first = bos if bos >= 0 else int(rng.integers(n_vocab))
        rest: TokenIds
        if request.tokens == "self":
            rest = model.sample([first], request.n_ctx - 1, rng)
        elif request.tokens == "random":
            rest = rng.integers(n_vocab, size=request.n_ctx - 1, dtype=np.int32)
        else:
            rest = _text_tokens(model, request, rng)
        drawn.append(np.concatenate([np.array([first], np.int32), rest]))
    return tuple(drawn)


def _text_tokens(model: LlamaModel, request: Request, rng: np.random.Generator) -> TokenIds:
    """Return a window of the text, from a place that rng draws."""
    if request.corpus is None:
        raise EngineError("tokens of kind text need a text")
    ids = model.vocab.tokenize(request.corpus.bytes, add_special=False)
    length = request.n_ctx - 1
    if len(ids) < length:
        raise EngineError(
            f"{request.corpus.name} has {len(ids)} tokens, {length} are needed; give a longer text"
        )
    start = int(rng.integers(len(ids) - length + 1))
    return ids[start : start + length]
