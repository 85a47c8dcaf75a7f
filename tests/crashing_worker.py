"""A worker whose llama.cpp dies by a signal: on a model called crash-N, in its N-th sequence."""

import os
import signal
from typing import Any

from ramgguf.engine import worker
from ramgguf.engine.llama import LlamaModel, Logits

_clear, _decode = LlamaModel.clear, LlamaModel.decode
_n_sequences: dict[str, int] = {}


def _counting_clear(self: LlamaModel) -> None:
    _n_sequences[self.path.stem] = _n_sequences.get(self.path.stem, 0) + 1
    _clear(self)


def _crashing_decode(self: LlamaModel, *arguments: Any, **options: Any) -> Logits:
    if self.path.stem == f"crash-{_n_sequences[self.path.stem]}":
        os.kill(os.getpid(), signal.SIGSEGV)
    return _decode(self, *arguments, **options)


if __name__ == "__main__":
    LlamaModel.clear = _counting_clear  # type: ignore[method-assign]
    LlamaModel.decode = _crashing_decode  # type: ignore[method-assign]
    worker.main()
