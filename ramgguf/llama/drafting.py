"""The layers of a model that draft tokens (multi-token prediction), run as llama.cpp runs them.

A layer reads a token and what the trunk made of the token before it, and predicts the next one. Of
several, each reads what the one before it made. llama.cpp runs each in a context of its own,
beside that of the trunk, for the architectures that it has such a graph of.
"""

import ctypes
from typing import Any

import numpy as np

from ramgguf.core.closing import Closing
from ramgguf.core.errors import EngineError
from ramgguf.llama.model import LlamaModel, Logits, read_states, view
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.system import nextn_module


class DraftLayers(Closing):
    """All draft layers of a model that was opened for drafts. Use as a context manager.

    The model's evaluation callback is asked about their nodes, too. Raises EngineError where
    llama.cpp makes no such context; an architecture without such a graph may end the process.
    """

    def __init__(self, model: LlamaModel) -> None:
        self._model, self._llama = model, model.llama
        self._nextn = nextn_module(model.llama)
        self._contexts: list[Any] = []
        n_batch, self._width = model.n_batch, model.state_width
        self._batch = self._llama.llama_batch_init(n_batch, self._width, 1)
        self._tokens = np.zeros(n_batch, np.int32)
        try:
            for number in range(self._llama.llama_model_n_layer_nextn(model.handle)):
                context = model.new_context(
                    ctx_type=self._llama.LLAMA_CONTEXT_TYPE_MTP, ctx_other=model.context
                )
                if context is None:
                    raise EngineError(f"{model.path}: llama.cpp makes no context to draft tokens")
                self._contexts.append(context)
                self._nextn.llama_set_embeddings_nextn(context, True, False)
                self._nextn.llama_set_nextn_layer_offset(context, number)
        except BaseException:
            self.close()
            raise
        self._states = view(self._batch.embd, n_batch * self._width).reshape(-1, self._width)
        self._positions = view(self._batch.pos, n_batch)
        view(self._batch.logits, n_batch)[:] = 1
        view(self._batch.n_seq_id, n_batch)[:] = 1
        for i in range(n_batch):
            self._batch.seq_id[i][0] = 0
        self._batch.token = self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self._before = np.zeros((len(self._contexts), self._width), np.float32)
        self._n_past = 0

    def close(self) -> None:
        """Free the contexts; the model must still be open."""
        for context in self._contexts:
            self._llama.llama_free(context)
        self._contexts = []
        if self._batch is not None:
            self._batch.token = None  # numpy's own
            self._llama.llama_batch_free(self._batch)
        self._batch = None

    def clear(self) -> None:
        """Forget the sequence."""
        for context in self._contexts:
            self._llama.llama_memory_clear(self._llama.llama_get_memory(context), True)
        self._before[:] = 0
        self._n_past = 0

    def decode(self, ids: TokenIds, states: Logits) -> None:
        """Run the layers on a chunk's tokens; states (n, width) are what the trunk made of them."""
        n = len(ids)
        for number, context in enumerate(self._contexts):
            self._tokens[:n] = ids
            self._states[0] = self._before[number]
            self._states[1:n] = states[: n - 1]
            self._before[number] = states[n - 1]
            self._positions[:n] = np.arange(self._n_past, self._n_past + n)
            self._batch.n_tokens = n
            code = self._llama.llama_decode(context, self._batch)
            if code != 0:
                raise EngineError(
                    f"{self._model.path}: llama_decode failed with code {code} on a layer that "
                    "drafts tokens"
                )
            if number + 1 < len(self._contexts):
                states = read_states(self._nextn, context, n, self._width)
        self._n_past += n
