"""Embeddings of texts by llama.cpp in this process: a model whose context pools its tokens."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ramgguf.core.errors import EngineError
from ramgguf.llama.kind import POOLINGS, kind_of, run_batch
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import TokenIds

Embedding = npt.NDArray[np.float32]

_POOLING = {name: number for number, name in POOLINGS.items()}


class EmbeddingModel(LlamaModel):
    """An embedding model with one context, for one text at a time. Use as a context manager.

    Tokens are pooled as the file says; where it says nothing, their mean is taken, as most such
    models do. Raises KindError for a model of another kind.
    """

    runs = "embedding"
    _pooling: str | None = None  # the file's own

    def _batch_size(self) -> int:
        # A token attends to later ones, too: the whole text is one batch. Learned positions end at
        # n_ctx_train, beyond which llama.cpp would read other memory.
        self.n_ctx = min(self.n_ctx, self.llama.llama_model_n_ctx_train(self.handle))
        return self.n_ctx

    def _parameters(self) -> Any:
        parameters = super()._parameters()
        parameters.embeddings = True
        if self._pooling is not None:
            parameters.pooling_type = _POOLING[self._pooling]
        return parameters

    def _open_context(self) -> None:
        super()._open_context()
        pooling = self.llama.llama_pooling_type(self._context)
        is_one = kind_of(self.llama, self.handle, self._context) == self.runs
        if is_one and pooling == _POOLING["none"]:
            self._free_context()
            self._pooling = "mean"
            super()._open_context()

    def embed(self, ids: TokenIds) -> Embedding:
        """Return the embedding of a text's tokens, not normalized: float32[n_embd_out].

        Raises EngineError for more tokens than the context has, and where llama.cpp gives none or
        one that has no direction: NaN, infinite or zero.
        """
        n = len(ids)
        if not 0 < n <= self.n_ctx:
            raise EngineError(f"{self.path}: a text of {n} tokens, expected 1 to {self.n_ctx}")
        self.clear()
        self._put(ids, first_output=0)
        llama = self.llama
        if (code := run_batch(llama, self.handle, self._context, self._batch)) != 0:
            raise EngineError(f"{self.path}: llama.cpp failed to embed a text, code {code}")
        pointer = llama.llama_get_embeddings_seq(self._context, 0)
        if not pointer:
            raise EngineError(f"{self.path}: it gives no embedding; is it an embedding model?")
        n_values = llama.llama_model_n_embd_out(self.handle)
        vector: Embedding = np.ctypeslib.as_array(pointer, shape=(n_values,)).copy()
        if not np.isfinite(vector).all() or not vector.any():
            raise EngineError(f"{self.path}: an embedding is zero, NaN or infinite")
        return vector
