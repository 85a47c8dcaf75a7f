"""A tensor as its quantization would leave it, in the source's own type: decoded and rounded back.

What runs on such weights differs from the quantized file in two ways only: kernels of quantized
formats round activations, too, and values are rounded once more to F16 or BF16.
"""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.imatrix import Imatrix

Rows = NDArray[np.uint8]
SOURCES = formats.FLOAT_FORMATS  # any value can be put in their place


def simulated(
    file: GGUFFile,
    tensor: TensorInfo,
    to: str,
    *,
    encoder: str,
    imatrix: Imatrix | None = None,
    threads: int = 1,
    store_as: str | None = None,
    out: Rows | None = None,
) -> tuple[Rows, float]:
    """Return the tensor quantized to a format and decoded again, and the NMSE of that.

    The rows, uint8 (n_rows, bytes), are of the source's type, one of SOURCES, or encoded once more
    (RTN) in the format store_as, that of a stand-in; the NMSE is then against the source as that
    stores it. It is weighed by the tensor's importance, where the matrix has some. The rows are
    written to `out`, if it is given. Raises ImatrixError when the matrix is for another shape.
    """
    scale = ErrorWeights.of(tensor, imatrix)
    kept = store_as or tensor.type_name
    made = empty_rows(tensor, kept) if out is None else out

    def convert(chunk: Chunk) -> _core.RowStats:
        rows = file.read_rows(tensor, chunk.start, chunk.stop)
        blocks = scale.encode(to, tensor.type_name, rows, chunk.start, tensor.row_length, encoder)
        made[chunk.start : chunk.stop] = after = _decoded(blocks, to, tensor, kept)
        return scale.compare(kept, stored(tensor, rows, kept), kept, after, chunk.start)

    stats = _core.RowStats.merged(list(map_chunks(convert, runs([tensor]), threads)))
    squares = scale.squares(stats)
    return made, scale.error(stats.errors[0]) / squares if squares else 0.0


def empty_rows(tensor: TensorInfo, to: str) -> Rows:
    """Return room for all rows of the tensor in a format, uint8 (n_rows, bytes)."""
    return np.empty((tensor.n_rows, formats.row_bytes(to, tensor.row_length)), np.uint8)


def stored(tensor: TensorInfo, rows: Rows, to: str) -> Rows:
    """Return rows of the tensor, uint8 (rows, bytes), as a stand-in in the format `to` has them."""
    if to == tensor.type_name:
        return rows
    plain = ErrorWeights(None, tensor.n_rows)
    return plain.encode(to, tensor.type_name, rows, 0, tensor.row_length, "rtn")


def _decoded(blocks: Rows, name: str, tensor: TensorInfo, kept: str) -> Rows:
    """Return quantized rows in the tensor's own type, then in the format `kept`."""
    if kept == formats.get(name).name:
        return blocks
    direct = kept if kept in SOURCES else tensor.type_name
    decoded = in_type(direct, decode_rows(name, blocks, tensor.row_length))
    return decoded if direct == kept else stored(tensor, decoded, kept)
