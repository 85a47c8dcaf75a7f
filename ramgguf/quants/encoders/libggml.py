"""ggml's own encoder and decoder, for the formats that the core has no kernels for.

IQ1_S and IQ1_M are worth their bits only with an importance matrix, and their encoders search large
codebooks. Q1_0 takes no notice of one, NVFP4 is decoded only. They come from libggml-base as
installed with llama-cpp-python, by ctypes and only when such a format is used. ggml ends the
process when its assertions fail, so everything that they ask for is checked here first.
"""

import ctypes
import importlib.util
import sys
import threading
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import FormatError
from ramgguf.quants import formats

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

# Scales are F16, so no weight that is larger can be held.
LARGEST_WEIGHT = 65504.0
# Importance below this share of the greatest of its block counts as this share, as in the core: a
# block without any would leave ggml's encoders without an error to compare.
SMALLEST_IMPORTANCE = 2.0**-20

_BLOCK = 256
_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_INIT = threading.Lock()


def is_installed() -> bool:
    """Return whether there is a libggml-base to load."""
    return _path() is not None


def decodes(name: str) -> bool:
    """Return whether there is a libggml that has the format, as it is known here."""
    if not is_installed():
        return False
    try:
        require(name)
    except FormatError:
        return False
    return True


def require(name: str) -> None:
    """Raise FormatError unless libggml is there and has the format, as it is known here."""
    library, f = _library(), formats.get(name)
    found = (library.ggml_type_name(f.type_id) or b"").decode().upper()
    if found != name or not hasattr(library, f"dequantize_row_{name.lower()}"):
        raise FormatError(
            f"the libggml of llama-cpp-python does not have {name} (type {f.type_id} is {found!r} "
            "there); install a newer llama-cpp-python"
        )
    n_bytes = library.ggml_type_size(ctypes.c_int(f.type_id))
    if n_bytes != f.block_bytes:
        raise FormatError(
            f"libggml's {name} has {n_bytes} bytes a block, expected {f.block_bytes}; install "
            "another llama-cpp-python"
        )


def encode(name: str, rows: Floats, importance: Floats | None) -> Blocks:
    """Return the blocks that ggml makes of rows, shape (rows, bytes of a row).

    rows has shape (rows, columns), float32; importance one float32 per column, not negative, of
    which only the ratios within a superblock count; None for formats that need none, which take no
    notice of it. Raises ValueError for weights or importance that do not fit, FormatError when
    libggml is missing or the format is one of SOURCES_ONLY.
    """
    if name in formats.SOURCES_ONLY:
        raise FormatError(f"{name} is decoded only; choose another format")
    require(name)
    library, type_id = _library(), formats.get(name).type_id
    weighs = formats.weighs_columns(name)
    _check(name, rows, importance, weighs=weighs)
    weighed = _weighed(importance) if weighs and importance is not None else None
    out = np.empty((len(rows), formats.row_bytes(name, rows.shape[1])), np.uint8)
    with _INIT:  # the tables are made once per format
        library.ggml_quantize_init(ctypes.c_int(type_id))
    n_bytes = library.ggml_quantize_chunk(
        ctypes.c_int(type_id),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        ctypes.c_void_p(None if weighed is None else weighed.ctypes.data),
    )
    if n_bytes != out.nbytes:
        raise FormatError(f"libggml made {n_bytes} bytes of {name}, expected {out.nbytes}")
    return out


def decode(name: str, blocks: Blocks, row_length: int) -> Floats:
    """Return the floats that blocks of a format stand for, shape (rows, row_length).

    Raises FormatError when libggml is missing, or lacks the format.
    """
    require(name)
    function = getattr(_library(), f"dequantize_row_{name.lower()}")
    if blocks.shape[1:] != (formats.row_bytes(name, row_length),):
        raise ValueError(f"rows of {row_length} weights of {name} cannot have {blocks.shape} bytes")
    blocks = np.ascontiguousarray(blocks)
    out = np.empty((len(blocks), row_length), np.float32)
    function(
        ctypes.c_void_p(blocks.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(out.size),
    )
    return out


def _check(name: str, rows: Floats, importance: Floats | None, *, weighs: bool) -> None:
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.flags.c_contiguous:
        raise ValueError(f"rows for {name} must be a contiguous array of rows of float32")
    if not formats.suits(name, rows.shape[1]):
        raise ValueError(f"rows of {rows.shape[1]} weights are not whole blocks of {name}")
    if weighs and (
        importance is None or importance.dtype != np.float32 or importance.shape != rows.shape[1:]
    ):
        raise ValueError(f"importance for {name} must be float32, one for each column")
    if importance is not None and not (np.isfinite(importance).all() and (importance >= 0).all()):
        raise ValueError("importance is negative or not finite")
    largest = np.abs(rows).max(initial=0)
    if not largest <= LARGEST_WEIGHT:
        raise ValueError(f"a weight of {largest:g} is NaN or too large for {name}")


def _weighed(importance: Floats) -> Floats:
    """Return the importance as shares of the greatest of its superblock, none of them zero."""
    blocks = importance.reshape(-1, _BLOCK)
    greatest = blocks.max(axis=1, keepdims=True)
    shares = np.divide(blocks, greatest, out=np.ones_like(blocks), where=greatest > 0)
    weighed: Floats = np.maximum(shares, np.float32(SMALLEST_IMPORTANCE)).reshape(-1)
    return weighed


def _path() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "lib" / _NAMES.get(sys.platform, "libggml-base.so")
    return path if path.exists() else None


@cache
def _library() -> ctypes.CDLL:
    path = _path()
    if path is None:
        extra = ", ".join(formats.by_libggml())
        raise FormatError(
            f"{extra} are read and written by libggml, which is missing; install it with "
            "pip install 'ramgguf[eval]', or leave these formats out with --formats"
        )
    library = ctypes.CDLL(str(path))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
