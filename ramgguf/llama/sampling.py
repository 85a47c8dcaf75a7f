"""Several sequences drawn from a model side by side: its weights are read once for all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.llama.model import LlamaModel, draw, view
from ramgguf.llama.protocol import TokenIds

_CONTEXT_STEP = 256  # llama.cpp rounds a sequence's context up to a multiple of it


def draw_together(
    model: LlamaModel, firsts: Sequence[int], n_tokens: int, rngs: Sequence[np.random.Generator]
) -> list[TokenIds]:
    """Return n_tokens after each first token, drawn from the model itself at temperature 1.

    The same arguments give the same tokens on the same machine, build and thread count. Drawn
    alone (LlamaModel.sample) or with others, a sequence has the same distribution, but not the
    same tokens: kernels for one column and for several round activations differently.
    A context for all sequences is made for it and freed. Raises EngineError when that fails.
    """
    n = len(firsts)
    llama, batch = model.llama, None
    context = _context(model, n, n_tokens)
    try:
        batch = llama.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        tokens, positions = view(batch.token, n), view(batch.pos, n)
        view(batch.n_seq_id, n)[:] = 1
        view(batch.logits, n)[:] = 1
        for i in range(n):
            batch.seq_id[i][0] = i
        drawn = np.empty((n, n_tokens), np.int32)
        tokens[:] = firsts
        for position in range(n_tokens):
            positions[:] = position
            if code := llama.llama_decode(context, batch):
                raise EngineError(f"{model.path}: llama_decode failed with code {code}")
            pointer = llama.llama_get_logits(context)
            if not pointer:
                raise EngineError(f"{model.path}: it gives no logits; is it a language model?")
            logits = np.ctypeslib.as_array(pointer, shape=(n, model.vocab.n_tokens))
            for i, rng in enumerate(rngs):
                drawn[i, position] = draw(logits[i], rng, 1.0)
            tokens[:] = drawn[:, position]
        return list(drawn)
    finally:
        if batch is not None:
            llama.llama_batch_free(batch)
        llama.llama_free(context)


def _context(model: LlamaModel, n_sequences: int, n_tokens: int) -> Any:
    """Return a context with room for each sequence."""
    llama = model.llama
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = n_sequences * -(-n_tokens // _CONTEXT_STEP) * _CONTEXT_STEP
    parameters.n_seq_max = n_sequences
    parameters.n_batch = parameters.n_ubatch = parameters.n_outputs_max = n_sequences
    parameters.n_threads = parameters.n_threads_batch = model.n_threads
    context = llama.llama_init_from_model(model.handle, parameters)
    if not context:
        raise EngineError(
            f"{model.path}: llama.cpp cannot make a context of {n_sequences} × {n_tokens} tokens"
        )
    return context
