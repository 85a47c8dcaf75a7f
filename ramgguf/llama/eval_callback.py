"""What llama.cpp calls for every node of a graph: once to ask, and once it is computed."""

import ctypes
from abc import ABC, abstractmethod
from typing import Any

from ramgguf.llama import ggml
from ramgguf.llama.system import llama_module


class EvalCallback(ABC):
    """An evaluation callback (`cb_eval`). `callback` is what a model is loaded with.

    An exception cannot pass through llama.cpp: it is kept, the graph ends, and raise_failure
    raises it.
    """

    def __init__(self) -> None:
        known = ggml.check_layout()
        self._multiplications = known.mul_mat, known.mul_mat_id
        self._routed = known.mul_mat_id
        self._failure: Exception | None = None
        self.callback: Any = llama_module().ggml_backend_sched_eval_callback(self._called)

    @abstractmethod
    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        """Return whether the node is wanted, or, once it is computed, whether the graph goes on.

        tensor points to it (ggml.TensorPointer).
        """

    def raise_failure(self) -> None:
        """Raise what went wrong in the last graph, if anything did."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _called(self, pointer: int, ask: bool, _user_data: object) -> bool:
        if self._failure is not None:
            return False
        try:
            return self._sees(ctypes.cast(pointer, ggml.TensorPointer), ask=ask)
        except Exception as e:
            self._failure = e
            return False
