"""The largest input of a model's weights: kernels of F16 weights round inputs to F16, too."""

from typing import Any

import numpy as np

from ramgguf.llama import ggml
from ramgguf.llama.eval_callback import EvalCallback
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import TokenIds


class InputRange(EvalCallback):
    """Keeps the largest |x| of the inputs of matrix multiplications.

    largest is infinite where an input is NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        node = tensor.contents
        if node.op not in self._multiplications:
            return not ask
        if not ask and ggml.is_f32(node.src[1]):
            found = ggml.read_array(node.src[1], np.float32)
            size = float(np.abs(found).max(initial=0))
            self.largest = max(self.largest, size if np.isfinite(size) else np.inf)
        return True

    def read(self, model: LlamaModel, ids: TokenIds) -> float:
        """Return the largest |x| while a model that has this callback reads a text."""
        model.clear()
        for start, end in model.chunks(len(ids)):
            model.decode(ids[start:end])
        self.raise_failure()
        return self.largest
