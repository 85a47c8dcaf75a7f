"""Greedy continuations of several prompts side by side: weights are read once for all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.llama.model import LlamaModel, view
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.sampling import joint_context

_BATCH = 512  # tokens of prompts that are decoded at a time


def generate_together(
    model: LlamaModel, prompts: Sequence[TokenIds], n_tokens: int
) -> list[TokenIds]:
    """Return up to n_tokens greedy tokens after each prompt; an end of generation is the last.

    The most probable token is taken, the one of lowest id on a tie. All prompts stay in the batch
    until the last has ended: two models run the same kernels on the same shapes. A context for all
    is made for it and freed. Raises EngineError when that fails, or logits are NaN.
    """
    with _Batch(model, prompts, n_tokens) as batch:
        tokens = batch.read_prompts(prompts)
        drawn = [tokens]
        ended = model.vocab.ends_generation(tokens)
        while len(drawn) < n_tokens and not ended.all():
            tokens = batch.step(tokens)
            drawn.append(tokens)
            ended |= model.vocab.ends_generation(tokens)
    return [_until_end(model, ids) for ids in np.stack(drawn, axis=1)]


def _until_end(model: LlamaModel, ids: TokenIds) -> TokenIds:
    ends = np.flatnonzero(model.vocab.ends_generation(ids))
    return ids[: ends[0] + 1] if len(ends) else ids


class _Batch:
    """A context with room for every prompt's sequence, and the batch that it decodes."""

    def __init__(self, model: LlamaModel, prompts: Sequence[TokenIds], n_tokens: int) -> None:
        self._model, self._llama = model, model.llama
        self._n = n = len(prompts)
        self._positions = np.array([len(p) for p in prompts], np.int32)
        longest = int(self._positions.max()) + n_tokens
        self._size = max(n, _BATCH)
        self._context = joint_context(
            model, n, longest, n_batch=self._size, advice="use a smaller --batch"
        )
        self._batch: Any = self._llama.llama_batch_init(self._size, 0, 1)
        view(self._batch.n_seq_id, self._size)[:] = 1

    def __enter__(self) -> "_Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)

    def read_prompts(self, prompts: Sequence[TokenIds]) -> TokenIds:
        """Decode the prompts and return the token after each."""
        ids = np.concatenate(prompts)
        sequences = np.repeat(np.arange(self._n), self._positions)
        positions = np.concatenate([np.arange(n) for n in self._positions])
        last = np.concatenate([np.arange(n) == n - 1 for n in self._positions])
        found = []
        for start in range(0, len(ids), self._size):
            part = slice(start, start + self._size)
            found.append(self._decode(ids[part], positions[part], sequences[part], last[part]))
        return np.concatenate(found)

    def step(self, tokens: TokenIds) -> TokenIds:
        """Decode a token of every sequence and return the one after it."""
        everyone = np.arange(self._n)
        found = self._decode(tokens, self._positions, everyone, np.ones(self._n, bool))
        self._positions = self._positions + 1
        return found

    def _decode(self, ids: Any, positions: Any, sequences: Any, wants: Any) -> TokenIds:
        """Return the most probable token after each that is wanted."""
        n, batch = len(ids), self._batch
        view(batch.token, self._size)[:n] = ids
        view(batch.pos, self._size)[:n] = positions
        view(batch.logits, self._size)[:n] = wants
        for i, sequence in enumerate(sequences):
            batch.seq_id[i][0] = int(sequence)
        batch.n_tokens = n
        path, n_rows = self._model.path, int(wants.sum())
        if code := self._llama.llama_decode(self._context, batch):
            raise EngineError(f"{path}: llama_decode failed with code {code}")
        if not n_rows:
            return np.empty(0, np.int32)
        pointer = self._llama.llama_get_logits(self._context)
        if not pointer:
            raise EngineError(f"{path}: it gives no logits; is it a language model?")
        logits = np.ctypeslib.as_array(pointer, shape=(n_rows, self._model.vocab.n_tokens))
        if np.isnan(logits.max(axis=1)).any():
            raise EngineError(f"{path}: nothing can be generated: logits are NaN")
        return np.asarray(logits.argmax(axis=1), np.int32)
