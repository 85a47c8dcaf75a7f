"""One tensor as its sensitivity is read: which can be, in which format, and with what error."""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core, formats
from ramgguf.fill_in import Member
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.roles import layer_of, never_quantized, role_of
from ramgguf.weighing import Scale

# The first that suits a tensor's rows is its probe: 4-bit errors are where plans are made.
PROBE_FORMATS = ("Q4_K", "Q4_0")
SOURCES = ("F32", "F16", "BF16")


def probe_format(tensor: TensorInfo) -> str:
    """Return the format in which the tensor's sensitivity is read."""
    return next(f for f in PROBE_FORMATS if formats.suits(f, tensor.row_length))


def is_probed(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether the tensor can be quantized and has a probe format."""
    return (
        tensor.type_name in SOURCES
        and never_quantized(tensor.name, tensor.shape, file.architecture) is None
        and any(formats.suits(f, tensor.row_length) for f in PROBE_FORMATS)
    )


def member(file: GGUFFile, tensor: TensorInfo) -> Member:
    """Return the tensor's place among those of its role."""
    role = role_of(tensor.name, file.architecture)
    return Member(tensor.name, role, layer_of(tensor.name), tensor.n_weights)


def quantized(
    rows: NDArray[np.uint8], tensor: TensorInfo, format_name: str, encoder: str, scale: Scale
) -> NDArray[np.uint8]:
    """Return the tensor's quantization, decoded and rounded to the source's own type."""
    n_rows, length = tensor.n_rows, tensor.row_length
    blocks = scale.encode(format_name, tensor.type_name, rows, 0, length, encoder)
    values = np.empty((n_rows, length), np.float32)
    _core.decode(format_name, blocks, values)
    if tensor.type_name == "F32":
        return values.view(np.uint8)
    out = np.empty_like(rows)
    _core.encode(tensor.type_name, "F32", values.view(np.uint8), out)
    return out


def nmse(
    rows: NDArray[np.uint8], data: NDArray[np.uint8], tensor: TensorInfo, scale: Scale
) -> float:
    """Return the tensor's error in data, of its own type, as a share of its squares."""
    stats = scale.compare(tensor.type_name, rows, tensor.type_name, data, 0)
    squares = scale.squares(stats)
    return scale.error(stats.errors[0]) / squares if squares else 0.0
