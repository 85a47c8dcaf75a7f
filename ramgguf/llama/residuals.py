"""The residual stream between two layers of a model, captured while it reads sequences."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.llama import ggml
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.system import llama_module

Rows = NDArray[np.float32]


class _Watch:
    """An evaluation callback that takes one node of every graph, and ends the graph there."""

    def __init__(self, node: bytes) -> None:
        ggml.check_layout()
        self._node = node
        self._taken: Rows | None = None
        self._failure: Exception | None = None
        self.callback: Any = llama_module().ggml_backend_sched_eval_callback(self._called)

    def _called(self, pointer: int, ask: bool, _user_data: object) -> bool:
        try:
            tensor = ctypes.cast(pointer, ggml.TensorPointer)
            if tensor.contents.name != self._node:
                return not ask
            if not ask:
                self._taken = ggml.read_array(tensor, np.float32)
            return ask
        except Exception as e:  # it cannot pass through llama.cpp
            self._failure = self._failure or e
            return False

    def rows(self) -> Rows:
        """Return what the last graph had there, a row for each token."""
        taken, self._taken = self._taken, None
        if self._failure is not None:
            raise self._failure
        if taken is None:
            raise EngineError(f"its graph has no node {self._node.decode()}")
        return taken.reshape(-1, taken.shape[-1])


def layer_inputs(model: LlamaModel, layer: int, sequences: Sequence[NDArray[Any]]) -> list[Rows]:
    """Return what enters the layer (1 or later), for each sequence: (tokens, columns).

    Sequences are what the model decodes: token ids, or rows. Raises EngineError where its graph
    does not name the node.
    """
    watch, found = _Watch(f"l_out-{layer - 1}".encode()), []
    with model.watched(watch.callback):
        for sequence in sequences:
            model.clear()
            parts = []
            for start, end in model.chunks(len(sequence)):
                model.decode(sequence[start:end], first_output=end - start)
                parts.append(watch.rows())
            found.append(np.concatenate(parts))
    return found
