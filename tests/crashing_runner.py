"""A runner's worker whose llama.cpp fails an assertion in its second comparison."""

import ctypes
from pathlib import Path

import llama_cpp

from ramgguf.llama import runner_worker
from ramgguf.llama.local_runner import LocalRunner
from ramgguf.llama.runner_protocol import Compare, Compared

_compared = runner_worker._compared
_n_compared = 0


def _failing(runner: LocalRunner, request: Compare) -> Compared:
    """Fail as GGML_ASSERT does: through ggml_abort."""
    global _n_compared
    _n_compared += 1
    if _n_compared == 2:
        library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base*"))))
        library.ggml_abort(b"ops.cpp", 7, b"GGML_ASSERT(%s) failed", b"a == b")
    return _compared(runner, request)


if __name__ == "__main__":
    runner_worker._compared = _failing
    runner_worker.main()
