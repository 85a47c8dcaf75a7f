"""The residual stream between two layers of a model, captured while it reads a sequence."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.llama import ggml
from ramgguf.llama.eval_callback import EvalCallback
from ramgguf.llama.model import LlamaModel

Rows = NDArray[np.float32]
NODE = "l_out-{}"  # what llama.cpp calls the output of a layer


class ResidualWatch(EvalCallback):
    """Takes what a layer puts out, and ends the graph there.

    Graphs run as without it while `node`, the name of that output, is None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.node: bytes | None = None
        self._taken: Rows | None = None

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        if self.node is None or tensor.contents.name != self.node:
            return not ask
        if not ask:
            self._taken = ggml.read_array(tensor, np.float32)
        return ask

    def rows(self) -> Rows:
        """Return what the last graph had there, a row for each token."""
        taken, self._taken = self._taken, None
        self.raise_failure()
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
