"""Measuring, encoding and comparing rows of a tensor, weighed by its importance if there is any.

An expert tensor has importance of its own for every expert, so a chunk of rows is taken expert by
expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core, formats, gptq, libggml
from ramgguf.gguf_io import TensorInfo
from ramgguf.gptq import Hessian
from ramgguf.imatrix import Imatrix

Rows = NDArray[np.uint8]


@dataclass(frozen=True)
class Scale:
    """How the errors of a tensor are weighed: importance (experts, columns), or all alike.

    With a Hessian (made when it is first needed), the error is that of the tensor's output.
    """

    importance: NDArray[np.float32] | None
    rows_per_expert: int
    hessian: Callable[[], Hessian] | None = None

    @staticmethod
    def of(tensor: TensorInfo, imatrix: Imatrix | None) -> "Scale":
        """Return the tensor's; raises ImatrixError when its entry is for another shape."""
        found = imatrix.importance(tensor.name, tensor.shape) if imatrix else None
        n_experts = 1 if found is None else len(found)
        hessians = imatrix.hessians if imatrix else None
        if found is None or hessians is None or tensor.name not in hessians.owners:
            return Scale(found, tensor.n_rows // n_experts)
        make = partial(hessians.factored, tensor.name, tensor.row_length)
        return Scale(found, tensor.n_rows // n_experts, make)

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
        if self.hessian is not None:
            return self._measure_outputs(names, type_name, rows, encoder)
        found = [
            _core.measure(
                list(names),
                type_name,
                rows[part],
                encoder=_feedforward(encoder),
                importance=importance,
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
        if self.hessian is not None and encoder == "gptq" and to in gptq.FORMATS:
            weights = _decoded(type_name, rows, row_length)
            assert self.importance is not None  # wherever there is a Hessian
            blocks[:] = gptq.encode(to, weights, self.hessian(), self.importance[0])
            return blocks
        for part, importance in self.parts(start, start + len(rows)):
            if importance is not None and not formats.get(to).encodable:
                blocks[part] = libggml.encode(
                    to, _decoded(type_name, rows[part], row_length), importance
                )
                continue
            _core.encode(
                to,
                type_name,
                rows[part],
                blocks[part],
                encoder=_feedforward(encoder),
                importance=importance,
            )
        return blocks

    def compare(
        self, type_name: str, before: Rows, to: str, after: Rows, start: int
    ) -> _core.RowStats:
        """Return the error of rows `after` against `before`, added up as measure does."""
        if self.hessian is not None:
            length = formats.row_weights(type_name, before.shape[1])
            weights = _decoded(type_name, before, length)
            return self._compare_outputs(type_name, before, weights, to, after)
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

    def _measure_outputs(
        self, names: Sequence[str], type_name: str, rows: Rows, encoder: str
    ) -> _core.RowStats:
        length = formats.row_weights(type_name, rows.shape[1])
        stats = _core.measure([], type_name, rows)
        if stats.first_nonfinite >= 0 or self.hessian is None:
            return stats
        weights = _decoded(type_name, rows, length)
        found, errors = [stats], []
        for name in names:
            try:
                blocks = self.encode(name, type_name, rows, 0, length, encoder)
                part = self._compare_outputs(type_name, rows, weights, name, blocks)
            except ValueError:  # a scale that overflows: measure says so, and of what format
                part = _core.measure([name], type_name, rows, importance=self._columns())
            found.append(part)
            errors.append(part.errors[0].weighted_squared_error)
        return _core.RowStats.joined(found, self.hessian().error(weights), errors)

    def _compare_outputs(
        self, type_name: str, before: Rows, weights: NDArray[np.float32], to: str, after: Rows
    ) -> _core.RowStats:
        assert self.hessian is not None
        hessian = self.hessian()
        stats = _core.compare(type_name, before, to, after)
        error = hessian.error(weights - _decoded(to, after, weights.shape[1]))
        return _core.RowStats.joined([stats], hessian.error(weights), [error])

    def _columns(self) -> NDArray[np.float32] | None:
        return None if self.importance is None else self.importance[0]


def _feedforward(encoder: str) -> str:
    """Return the encoder for what has no Hessian: gptq fits scales as search does."""
    return "search" if encoder == "gptq" else encoder


def _decoded(type_name: str, rows: Rows, row_length: int) -> NDArray[np.float32]:
    out = np.empty((len(rows), row_length), np.float32)
    _core.decode(type_name, rows, out)
    return out
