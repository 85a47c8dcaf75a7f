"""A server whose llama.cpp dies by a signal when it is tried, unless it has safe kernels."""

import os
import signal
from typing import Any

from ramgguf.llama import server
from ramgguf.llama.server_protocol import Serve

_try = server._try


def _crashing_try(model: Any, request: Serve) -> None:
    if not request.safe_kernels:
        os.kill(os.getpid(), signal.SIGSEGV)
    _try(model, request)


def main() -> None:
    server._try = _crashing_try
    server.main()
