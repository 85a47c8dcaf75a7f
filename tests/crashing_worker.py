"""A worker whose llama.cpp dies by a signal.

It does so on a model called crash-N, in its N-th sequence, and on one called fragile unless that is
loaded with safe kernels.
"""

import os
import signal
from typing import Any

from ramgguf.llama import worker
from ramgguf.llama.model import LlamaModel, Logits

_init, _clear, _decode = LlamaModel.__init__, LlamaModel.clear, LlamaModel.decode
_n_sequences: dict[str, int] = {}
_is_safe: dict[str, bool] = {}


def _noting_init(self: LlamaModel, *arguments: Any, **options: Any) -> None:
    _init(self, *arguments, **options)
    _is_safe[self.path.stem] = options["safe_kernels"]


def _counting_clear(self: LlamaModel) -> None:
    _n_sequences[self.path.stem] = _n_sequences.get(self.path.stem, 0) + 1
    _clear(self)


def _crashing_decode(self: LlamaModel, *arguments: Any, **options: Any) -> Logits:
    name = self.path.stem
    if name == f"crash-{_n_sequences[name]}" or (name == "fragile" and not _is_safe[name]):
        os.kill(os.getpid(), signal.SIGSEGV)
    return _decode(self, *arguments, **options)


if __name__ == "__main__":
    # mypy refuses methods to be replaced, which is what this file is for.
    LlamaModel.__init__ = _noting_init  # type: ignore[method-assign]
    LlamaModel.clear = _counting_clear  # type: ignore[method-assign]
    LlamaModel.decode = _crashing_decode  # type: ignore[method-assign]
    worker.main()
