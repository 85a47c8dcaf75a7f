"""libggml, as installed with llama-cpp-python, as an oracle for block formats."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ramgguf.quants import formats


class _TypeTraits(ctypes.Structure):
    # struct ggml_type_traits of ggml.h (ggml 0.25)
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


class _CPUTypeTraits(ctypes.Structure):
    # struct ggml_type_traits_cpu of ggml-cpu.h (ggml 0.25)
    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@cache
def library() -> ctypes.CDLL:
    """Return libggml-base; skips the test where llama-cpp-python is not installed."""
    llama_cpp = pytest.importorskip("llama_cpp")
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    return lib


def inputs_block_size(type_name: str) -> int:
    """Return how many inputs the CPU's kernels of the type round together; 1 where they do not."""
    base = library()
    cpu = ctypes.CDLL(str(Path(base._name).with_name("libggml-cpu.so")))
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CPUTypeTraits)
    of_inputs = cpu.ggml_get_type_traits_cpu(formats.get(type_name).type_id).contents.vec_dot_type
    return int(base.ggml_get_type_traits(of_inputs).contents.blck_size)


def decoding_types() -> set[str]:
    """Return the names of all types that ggml decodes to floats, F32 among them.

    Those are looked at whose numbers are no larger than any known here: ggml ends the process when
    it is asked for one that it does not have.
    """
    found = {"F32"}
    for type_id in range(1 + max(formats.get(name).type_id for name in formats.known())):
        traits = library().ggml_get_type_traits(type_id).contents
        if traits.to_float:
            found.add(traits.type_name.decode().upper())
    return found


def _traits(type_name: str) -> _TypeTraits:
    type_id = formats.get(type_name).type_id
    traits = library().ggml_get_type_traits(type_id).contents
    assert isinstance(traits, _TypeTraits)
    found = traits.type_name.decode().upper()
    if found != type_name:
        raise RuntimeError(f"ggml calls type {type_id} {found}, not {type_name}: other layout?")
    return traits


def dequantize(type_name: str, rows: NDArray[np.uint8], row_length: int) -> NDArray[np.float32]:
    """Return what ggml decodes from rows of blocks, shape (rows, row_length)."""
    to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        _traits(type_name).to_float or 0
    )
    rows = np.ascontiguousarray(rows)
    out = np.empty((rows.shape[0], row_length), np.float32)
    to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def _n_row_bytes(type_name: str, row_length: int) -> int:
    traits = _traits(type_name)
    return int(row_length // traits.blck_size * traits.type_size)


def quantize(
    type_name: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return the blocks that ggml_quantize_chunk makes of rows; importance is one per column.

    Formats for which ggml aborts without importance get the same for all columns.
    """
    if importance is None and type_name in ("IQ2_XXS", "IQ2_XS", "IQ2_S"):
        importance = np.ones(rows.shape[1], np.float32)
    rows = np.ascontiguousarray(rows)
    out = np.zeros((rows.shape[0], _n_row_bytes(type_name, rows.shape[1])), np.uint8)
    n_bytes = library().ggml_quantize_chunk(
        ctypes.c_int(formats.get(type_name).type_id),
        ctypes.c_void_p(rows.ctypes.data),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(0),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(rows.shape[1]),
        None if importance is None else ctypes.c_void_p(importance.ctypes.data),
    )
    assert n_bytes == out.nbytes
    return out


def quantize_reference(type_name: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the blocks that ggml's from_float_ref makes of rows."""
    from_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
        _traits(type_name).from_float_ref or 0
    )
    rows = np.ascontiguousarray(rows)
    out = np.zeros((rows.shape[0], _n_row_bytes(type_name, rows.shape[1])), np.uint8)
    from_float(rows.ctypes.data, out.ctypes.data, rows.size)
    return out
