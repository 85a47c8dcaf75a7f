"""Measuring, encoding and comparing rows of a tensor, weighed by its importance if there is any.

An expert tensor has importance of its own for every expert, so a chunk of rows is taken expert by
expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core, formats, libggml
from ramgguf.gguf_io import TensorInfo
from ramgguf.imatrix import Imatrix

Rows = NDArray[np.uint8]


@dataclass(frozen=True)
class Scale:
    """How the weights of a tensor are weighed: importance (experts, columns), or all alike."""

    importance: NDArray[np.float32] | None
    rows_per_expert: int

    @staticmethod
    def of(tensor: TensorInfo, imatrix: Imatrix | None) -> "Scale":
        """Return the tensor's; raises ImatrixError when its entry is for another shape."""
        found = imatrix.importance(tensor.name, tensor.shape) if imatrix else None
        n_experts = 1 if found is None else len(found)
        return Scale(found, tensor.n_rows // n_experts)

    def parts(self, start: int, stop: int) -> Iterator[tuple[slice, NDArray[np.float32] | None]]:
        """Yield slices of the rows start to stop, counted from start, each with its importance."""
        if self.importance is None:
            yield slice(0, stop - start), None
            return
        at = start
        while at < stop:
            expert = at // self.rows_per_expert
            end = min(stop, (expert + 1) * self.rows_per_expert)
            yield slice(at - start, end - start), self.importance[expert]
            at = end

    def measure(
        self, names: Sequence[str], type_name: str, rows: Rows, start: int, encoder: str
    ) -> _core.RowStats:
        """Return what _core.measure finds in rows, the tensor's from row `start` on."""
        found = [
            _core.measure(
                list(names), type_name, rows[part], encoder=encoder, importance=importance
            )
            for part, importance in self.parts(start, start + len(rows))
        ]
        return found[0] if len(found) == 1 else _core.RowStats.merged(found)

    def encode(
        self,
        to: str,
        type_name: str,
        rows: Rows,
        start: int,
        row_length: int,
        encoder: str,
        out: Rows | None = None,
    ) -> Rows:
        """Return the rows, the tensor's from row `start` on, in the format `to`.

        out, if given, is a buffer of at least as many bytes, whose head is filled and returned.
        """
        row_bytes = formats.row_bytes(to, row_length)
        if out is None:
            out = np.empty(len(rows) * row_bytes, np.uint8)
        blocks = out.reshape(-1)[: len(rows) * row_bytes].reshape(len(rows), row_bytes)
        for part, importance in self.parts(start, start + len(rows)):
            if importance is not None and not formats.get(to).encodable:
                blocks[part] = libggml.encode(
                    to, _floats(type_name, rows[part], row_length), importance
                )
                continue
            _core.encode(
                to, type_name, rows[part], blocks[part], encoder=encoder, importance=importance
            )
        return blocks

    def compare(
        self, type_name: str, before: Rows, to: str, after: Rows, start: int
    ) -> _core.RowStats:
        """Return the error of rows `after` against `before`, added up as measure does."""
        if not formats.get(to).encodable:
            f = formats.get(to)
            length = after.shape[1] // f.block_bytes * f.block_size
            to, after = "F32", libggml.decode(to, after, length).view(np.uint8)
        found = [
            _core.compare(type_name, before[part], to, after[part], importance=importance)
            for part, importance in self.parts(start, start + len(before))
        ]
        return found[0] if len(found) == 1 else _core.RowStats.merged(found)

    def squares(self, stats: _core.RowStats) -> float:
        """Return the sum of squares that errors are a share of: weighed, if there is importance."""
        return stats.sum_squares if self.importance is None else stats.weighted_sum_squares

    def error(self, error: _core.FormatError_) -> float:
        """Return the sum of squared errors: weighed, if there is importance."""
        if self.importance is None:
            return error.sum_squared_error
        return error.weighted_squared_error


def _floats(type_name: str, rows: Rows, row_length: int) -> NDArray[np.float32]:
    out = np.empty((len(rows), row_length), np.float32)
    _core.decode(type_name, rows, out)
    return out
