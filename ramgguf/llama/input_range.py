"""The largest input of a model's weights: kernels of F16 weights round inputs to F16, too."""

import ctypes
from typing import Any

import numpy as np

from ramgguf.llama import ggml
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.system import llama_module


class InputRange:
    """An evaluation callback that keeps the largest |x| of the inputs of matrix multiplications.

    largest is infinite where an input is NaN.
    """

    def __init__(self) -> None:
        known = ggml.check_layout()
        self._multiplications = known.mul_mat, known.mul_mat_id
        self.largest = 0.0
        self._failure: Exception | None = None
        self.callback: Any = llama_module().ggml_backend_sched_eval_callback(self._called)

    def _called(self, pointer: int, ask: bool, _user_data: object) -> bool:
        try:
            tensor = ctypes.cast(pointer, ggml.TensorPointer)
            if tensor.contents.op not in self._multiplications:
                return not ask
            if not ask and ggml.is_f32(tensor.contents.src[1]):
                found = ggml.read_array(tensor.contents.src[1], np.float32)
                size = float(np.abs(found).max(initial=0))
                self.largest = max(self.largest, size if np.isfinite(size) else np.inf)
            return True
        except Exception as e:  # it cannot pass through llama.cpp
            self._failure = self._failure or e
            return False

    def read(self, model: LlamaModel, ids: TokenIds) -> float:
        """Return the largest |x| while a model that has this callback reads a text."""
        model.clear()
        for start, end in model.chunks(len(ids)):
            model.decode(ids[start:end])
        if self._failure is not None:
            raise self._failure
        return self.largest
