"""The residual stream between two layers of a model, captured while it reads a sequence."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.llama import ggml
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.system import llama_module

Rows = NDArray[np.float32]
NODE = "l_out-{}"  # what llama.cpp calls the output of a layer


class ResidualWatch:
    """An evaluation callback that takes what a layer puts out, and ends the graph there.

    Graphs run as without it while `node`, the name of that output, is None.
    """

    def __init__(self) -> None:
        ggml.check_layout()
        self.node: bytes | None = None
        self._taken: Rows | None = None
        self._failure: Exception | None = None
        self.callback: Any = llama_module().ggml_backend_sched_eval_callback(self._called)

    def _called(self, pointer: int, ask: bool, _user_data: object) -> bool:
        if self.node is None:
            return not ask
        try:
            tensor = ctypes.cast(pointer, ggml.TensorPointer)
            if tensor.contents.name != self.node:
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
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if taken is None:
            raise EngineError(f"its graph has no node {(self.node or b'').decode()}")
        return taken.reshape(-1, taken.shape[-1])


def layer_outputs(
    model: LlamaModel, watch: ResidualWatch, layer: int, sequence: NDArray[Any]
) -> Rows:
    """Return the residual stream after the layer of a model that has the watch: (tokens, columns).

    The sequence is what the model decodes: token ids, or rows. The layers after this one are not
    computed. Raises EngineError where its graph does not name the node.
    """
    watch.node = NODE.format(layer).encode()
    try:
        model.clear()
        parts = []
        for start, end in model.chunks(len(sequence)):
            # The last layer computes only the tokens whose logits are asked for.
            model.decode(sequence[start:end], ends_early=True)
            parts.append(watch.rows())
        return np.concatenate(parts)
    finally:
        watch.node = None
