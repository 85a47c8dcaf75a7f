"""Which llama.cpp runs, on which machine."""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from ramgguf.core.errors import EngineError
from ramgguf.llama.protocol import SystemInfo

_ERROR = 4  # ggml's log level
_log_callback: Any = None  # llama.cpp keeps a pointer to it


def llama_module(*, verbose: bool = False) -> ModuleType:
    """Return the module llama_cpp, its backend initialized and its log silenced unless verbose.

    Raises EngineError when it is not installed.
    """
    global _log_callback
    # libgomp reads this when it is loaded. By default its threads spin for milliseconds at each of
    # the many barriers of a decode, which takes several times as long when CPUs are shared.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import llama_cpp
    except ImportError as e:
        raise EngineError(
            f"llama-cpp-python cannot be imported ({e}); pip install 'ramgguf[eval]'"
        ) from None

    def log(level: int, text: bytes, _user_data: object) -> None:
        if verbose or level == _ERROR:
            sys.stderr.write(text.decode("utf-8", "replace"))
            sys.stderr.flush()

    first_call = _log_callback is None
    _log_callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(_log_callback, None)
    if first_call:
        llama_cpp.llama_backend_init()
    module: ModuleType = llama_cpp
    return module


def nextn_module(llama: ModuleType) -> ModuleType:
    """Return what llama-cpp-python has for the hidden states that tokens are drafted from.

    Raises EngineError where it has none: these functions are no stable interface.
    """
    try:
        from llama_cpp import llama_cpp_ext
    except (ImportError, AttributeError):
        llama_cpp_ext = None
    if llama_cpp_ext is None or not hasattr(llama, "LLAMA_CONTEXT_TYPE_MTP"):
        raise EngineError(f"llama-cpp-python {llama.__version__} runs no layers that draft tokens")
    module: ModuleType = llama_cpp_ext
    return module


def llama_installed() -> bool:
    """Return whether there is a module llama_cpp; it is not imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def system_info() -> SystemInfo:
    """Return versions and CPU features of the llama.cpp that runs."""
    llama = llama_module()
    build = llama.llama_version().decode()
    base = Path(str(llama.__file__)).parent / "lib"
    for library in sorted(base.glob("*ggml-base.*")):
        commit = getattr(ctypes.CDLL(str(library)), "ggml_commit", None)
        if commit is not None:
            commit.restype = ctypes.c_char_p
            build += f" (ggml {commit().decode()})"
            break
    return SystemInfo(
        llama_cpp_python=llama.__version__,
        build=build,
        system_info=llama.llama_print_system_info().decode().strip(),
        cpu=cpu_name(),
    )


def cpu_name() -> str:
    """Return the CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
