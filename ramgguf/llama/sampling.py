"""Many sequences drawn from a model side by side: its weights are read once for all of them.

A step decodes one token of each sequence. With 64 of them it costs about as much as a prompt of 64
tokens, and drawing runs at nearly the speed of prompts.
"""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import available_memory
from ramgguf.llama.breakdown import memory_breakdown
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel, Logits, view
from ramgguf.llama.protocol import TokenIds

_CONTEXT_STEP = 256  # llama.cpp rounds a sequence's context up to a multiple of it
_BLOCK = 512  # tokens of the vocabulary whose probabilities are added up first
_SAMPLED_BYTES = 16 << 20  # of probabilities that are worked on at a time


@dataclass(frozen=True)
class Steps:
    """Sequences that are being drawn: n_done steps of them.

    drawn (n, n_tokens) has the tokens up to there; the context holds the sequences 0 … n − 1.
    """

    n_done: int
    drawn: npt.NDArray[np.int32]
    llama: ModuleType
    context: Any


@dataclass(frozen=True)
class Begun:
    """Steps that were done before: the tokens (n, n_done), and llama.cpp's state of each sequence.

    Restored, a sequence goes on to the bit as if it had never ended.
    """

    n_done: int
    tokens: npt.NDArray[np.int32]
    states: Iterable[npt.NDArray[np.uint8]]


def draw_together(
    model: LlamaModel,
    firsts: Sequence[int],
    n_tokens: int,
    rngs: Sequence[np.random.Generator],
    *,
    tap: Tap | None = None,
    on_step: Callable[[], None] = lambda: None,
    begun: Begun | None = None,
    keep: Callable[[Steps], None] = lambda _: None,
) -> list[TokenIds]:
    """Return n_tokens after each first token, drawn from the model itself at temperature 1.

    The same arguments give the same tokens on the same machine, build and thread count. Drawn
    alone (LlamaModel.sample) or with others, a sequence has the same distribution, but not the
    same tokens: kernels for one column and for several round activations differently.

    A tap sees the inputs of the weights meanwhile, those at the last token drawn included; on_step
    is called after each decode, and keep with what a later call may go on from, as begun (the tap's
    state is its own). A context for all sequences is made for it and freed. Raises EngineError when
    that fails.
    """
    n = len(firsts)
    llama, batch = model.llama, None
    n_steps = n_tokens if tap is None else n_tokens + 1
    context = joint_context(model, n, n_steps, tap=tap)
    try:
        batch = llama.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        tokens, positions = view(batch.token, n), view(batch.pos, n)
        view(batch.n_seq_id, n)[:] = 1
        view(batch.logits, n)[:] = 1
        for i in range(n):
            batch.seq_id[i][0] = i
        drawn = np.empty((n, n_tokens), np.int32)
        uniforms = np.stack([rng.random(n_tokens) for rng in rngs])
        tokens[:] = firsts
        n_done = 0
        if begun is not None and begun.n_done:
            n_done = begun.n_done
            _restore(llama, context, begun.states)
            drawn[:, :n_done] = begun.tokens
            tokens[:] = drawn[:, n_done - 1]
        for position in range(n_done, n_steps):
            positions[:] = position
            if code := llama.llama_decode(context, batch):
                raise EngineError(f"{model.path}: llama_decode failed with code {code}")
            pointer = llama.llama_get_logits(context)  # waits for the computation's end
            if tap is not None:
                tap.check()
            if not pointer:
                raise EngineError(f"{model.path}: it gives no logits; is it a language model?")
            if position < n_tokens:
                logits = np.ctypeslib.as_array(pointer, shape=(n, model.vocab.n_tokens))
                drawn[:, position] = sampled(logits, uniforms[:, position])
                tokens[:] = drawn[:, position]
            on_step()
            if position < n_tokens:
                keep(Steps(position + 1, drawn, llama, context))
        return list(drawn)
    finally:
        if batch is not None:
            llama.llama_batch_free(batch)
        llama.llama_free(context)


def _restore(llama: ModuleType, context: Any, states: Iterable[npt.NDArray[np.uint8]]) -> None:
    for number, state in enumerate(states):
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        n_bytes = len(state)
        if llama.llama_state_seq_set_data(context, pointer, n_bytes, number) != n_bytes:
            raise EngineError("llama.cpp does not take a sequence's state back")


def sampled(logits: Logits, uniforms: npt.NDArray[np.float64]) -> TokenIds:
    """Return a token for each row of logits (n, n_vocab), drawn from its softmax.

    The token is where the cumulative probability passes the row's uniform number in [0, 1).
    Probabilities are float32, their sums over blocks of the vocabulary float64. Raises EngineError
    when logits are NaN or infinite.
    """
    n, n_vocab = logits.shape
    at_a_time = max(1, _SAMPLED_BYTES // (4 * n_vocab))
    found = np.empty(n, np.int32)
    for start in range(0, n, at_a_time):
        rows = slice(start, start + at_a_time)
        found[rows] = _sampled(logits[rows], uniforms[rows])
    return found


def _sampled(logits: Logits, uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    n, n_vocab = logits.shape
    n_blocks = -(-n_vocab // _BLOCK)
    shares = np.zeros((n, n_blocks * _BLOCK), np.float32)
    inside = shares[:, :n_vocab]
    with np.errstate(invalid="ignore"):  # infinite logits; the sum shows them
        np.subtract(logits, logits.max(axis=1, keepdims=True), out=inside)
    np.exp(inside, out=inside)
    blocks = shares.reshape(n, n_blocks, _BLOCK)
    cumulative = blocks.sum(axis=2).cumsum(axis=1, dtype=np.float64)
    if not np.isfinite(cumulative[:, -1]).all():
        raise EngineError("nothing can be drawn: logits are NaN or infinite")
    wanted = uniforms * cumulative[:, -1]
    block = _passed(cumulative, wanted)
    every = np.arange(n)
    before = np.where(block > 0, cumulative[every, block - 1], 0.0)
    chosen = blocks[every, block]
    return block * _BLOCK + _passed(chosen.cumsum(axis=1, dtype=np.float64), wanted - before)


def _passed(
    cumulative: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return where each row of sums first exceeds its number.

    Where rounding lets none exceed it, that is the last place at which the sum still grows: no
    token of probability 0 is drawn.
    """
    passed = (cumulative <= wanted[:, None]).sum(axis=1)
    last = (cumulative < cumulative[:, -1:]).sum(axis=1)
    found: npt.NDArray[np.int64] = np.minimum(passed, last)
    return found


def most_together(model: LlamaModel, n_tokens: int, most: int) -> int:
    """Return how many sequences of n_tokens the model draws side by side: at most `most`.

    What they take, key-value cache and logits, is held to half of the memory that is left beside
    the weights (a quarter of all that is available, where the weights leave less). A number below
    `most` is a power of two, so that it seldom differs between two runs.
    """
    try:
        available = available_memory().n_bytes
    except BudgetError:  # a system that does not tell
        return most
    left = max(available - model.llama.llama_model_size(model.handle), available // 2) // 2
    fits = left // max(1, _bytes_each(model, n_tokens))
    return most if fits >= most else 1 << (max(1, fits).bit_length() - 1)


def _bytes_each(model: LlamaModel, n_tokens: int) -> int:
    """Return what a further sequence takes: its cache, its logits twice, its probabilities."""
    n_bytes = 3 * 4 * model.vocab.n_tokens
    with suppress(EngineError):
        context = joint_context(model, 1, n_tokens)
        try:
            found = memory_breakdown(model.llama, context) or ()
            n_bytes += sum(part.cache for part in found)
        finally:
            model.llama.llama_free(context)
    return n_bytes


def joint_context(
    model: LlamaModel,
    n_sequences: int,
    n_tokens: int,
    *,
    n_batch: int | None = None,
    tap: Tap | None = None,
    advice: str = "",
) -> Any:
    """Return a context of its own with room for sequences of n_tokens each; the caller frees it.

    n_batch tokens, by default one of each sequence, are decoded at a time, and one of each may have
    logits. Raises EngineError, with the advice, when llama.cpp cannot make it.
    """
    llama = model.llama
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = n_sequences * -(-n_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
    parameters.n_seq_max = parameters.n_outputs_max = n_sequences
    parameters.n_batch = parameters.n_ubatch = n_batch or n_sequences
    parameters.n_threads = parameters.n_threads_batch = model.n_threads
    if tap is not None:
        parameters.cb_eval = tap.callback  # the tap outlives the context
    context = llama.llama_init_from_model(model.handle, parameters)
    if not context:
        raise EngineError(
            f"{model.path}: llama.cpp cannot make a context of {n_sequences} × {n_tokens} tokens"
            + (f"; {advice}" if advice else "")
        )
    return context
