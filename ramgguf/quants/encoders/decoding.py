"""Blocks of any format as floats: by the core's kernels, or by libggml where those are missing."""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.errors import FormatError
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml

# The least values that round to infinity.
_INFINITE_FROM = {"F32": np.inf, "F16": 65520.0, "BF16": float.fromhex("0x1.ffp127")}


def decode_rows(type_name: str, rows: NDArray[np.uint8], row_length: int) -> NDArray[np.float32]:
    """Return what rows of a type stand for, shape (rows, row_length).

    Raises FormatError when libggml is needed and missing.
    """
    if not formats.get(type_name).encodable:
        return libggml.decode(type_name, rows, row_length)
    out = np.empty((len(rows), row_length), np.float32)
    _core.decode(type_name, rows, out)
    return out


def readable(type_name: str, rows: NDArray[np.uint8]) -> tuple[str, NDArray[np.uint8]]:
    """Return the rows as the kernels read them: decoded to F32, if their format is libggml's."""
    if formats.get(type_name).encodable:
        return type_name, rows
    weights = decode_rows(type_name, rows, formats.row_weights(type_name, rows.shape[1]))
    return "F32", weights.view(np.uint8)


def in_type(type_name: str, values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return rows of weights, float32 (rows, n), as bytes of F32, F16 or BF16.

    Raises FormatError where a weight is NaN, or so large that the type would make it infinite.
    """
    limit = _INFINITE_FROM[type_name]
    low, high = values.min(initial=0), values.max(initial=0)
    if not (-limit < low and high < limit):
        raise FormatError(f"a weight of {max(high, -low):g} is NaN or too large for {type_name}")
    if type_name == "F32":
        return values.view(np.uint8)
    rows = np.empty((len(values), formats.row_bytes(type_name, values.shape[1])), np.uint8)
    _core.encode(type_name, "F32", values.view(np.uint8), rows)
    return rows
