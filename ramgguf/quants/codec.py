"""Measuring, encoding and comparing rows of a tensor, weighted by its importance if there is any.

An expert tensor has importance of its own for every expert, so a chunk of rows is taken expert by
expert.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.errors import FormatError
from ramgguf.core.parallel import by_expert
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants import formats
from ramgguf.quants.encoders import ENCODERS, libggml
from ramgguf.quants.encoders.decoding import decode_rows, readable
from ramgguf.quants.hessian import Hessian
from ramgguf.quants.imatrix import Imatrix, ImportanceSource, planned_imatrix

Rows = NDArray[np.uint8]
Importance = NDArray[np.float32] | None
Job = TypeVar("Job")


@dataclass(frozen=True)
class ErrorWeights:
    """The error weights of a tensor: importance (experts, columns), or one for all.

    With a Hessian (made when it is first needed), the error is that of the tensor's output.
    """

    importance: NDArray[np.float32] | None
    rows_per_expert: int
    hessian: Callable[[], Hessian] | None = None

    @staticmethod
    def of(tensor: TensorInfo, imatrix: Imatrix | None) -> "ErrorWeights":
        """Return the tensor's; raises ImatrixError when its entry is for another shape."""
        found = imatrix.importance(tensor.name, tensor.shape) if imatrix else None
        n_experts = 1 if found is None else len(found)
        hessians = imatrix.hessians if imatrix else None
        if found is None or hessians is None or hessians.owner(tensor.name) is None:
            return ErrorWeights(found, tensor.n_rows // n_experts)
        make = partial(hessians.factored, tensor.name, tensor.row_length)
        return ErrorWeights(found, tensor.n_rows // n_experts, make)

    def parts(self, start: int, stop: int) -> Iterator[tuple[slice, Importance]]:
        """Yield slices of the rows start to stop, counted from start, each with its importance."""
        if self.importance is None:
            yield slice(0, stop - start), None
            return
        for expert, part in by_expert(start, stop, self.rows_per_expert):
            yield part, self.importance[expert]

    def measure(
        self, names: Sequence[str], type_name: str, rows: Rows, start: int, encoder: str
    ) -> _core.RowStats:
        """Return what _core.measure finds in rows, the tensor's from row `start` on."""
        return measure([Piece(self, type_name, rows, start)], [names], encoder)[0]

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
        encode([Piece(self, type_name, rows, start)], [to], [blocks], encoder)
        return blocks

    def compare(
        self, type_name: str, before: Rows, to: str, after: Rows, start: int
    ) -> _core.RowStats:
        """Return the error of rows `after` against `before`, added up as measure does."""
        return compare([Piece(self, type_name, before, start)], [to], [after])[0]

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
        weights = decode_rows(type_name, rows, length)
        squares = self.hessian().error(weights)
        found, errors = [stats], []
        for name in names:
            try:
                blocks = self.encode(name, type_name, rows, 0, length, encoder)
                part = self._compare_outputs(type_name, rows, weights, name, blocks, squares)
            except ValueError as e:  # a scale that overflows: measure reports it with the format
                if not formats.get(name).encodable:
                    raise FormatError(f"{e}; leave {name} out with --formats") from None
                part = _core.measure([name], type_name, rows, importance=self._columns())
            found.append(part)
            errors.append(part.errors[0].weighted_squared_error)
        return _core.RowStats.joined(found, squares, errors, list(names))

    def _compare_outputs(
        self,
        type_name: str,
        before: Rows,
        weights: NDArray[np.float32],
        to: str,
        after: Rows,
        squares: float | None = None,
    ) -> _core.RowStats:
        """Return the output's error; squares is that of the weights themselves, where known."""
        assert self.hessian is not None
        hessian = self.hessian()
        known, rows = readable(to, after)
        stats = _core.compare(type_name, before, known, rows)
        error = hessian.error(weights - decode_rows(known, rows, weights.shape[1]))
        if squares is None:
            squares = hessian.error(weights)
        return _core.RowStats.joined([stats], squares, [error], [to])

    def _columns(self) -> NDArray[np.float32] | None:
        return None if self.importance is None else self.importance[0]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor, uint8 (rows, bytes) of the type named, from its row `start` on."""

    scale: ErrorWeights
    type_name: str
    rows: Rows
    start: int

    def readable(self) -> "Piece":
        """Return the piece with rows that the kernels read."""
        name, rows = readable(self.type_name, self.rows)
        return self if rows is self.rows else Piece(self.scale, name, rows, self.start)

    def parts(self) -> Iterator[tuple[slice, Importance]]:
        """Yield slices of the rows, each with its importance."""
        return self.scale.parts(self.start, self.start + len(self.rows))

    def plain_parts(self) -> Iterator[tuple[slice, Importance]]:
        """Yield the parts, none of them where a Hessian tells the error."""
        if self.scale.hessian is None:
            yield from self.parts()

    def weights(self) -> NDArray[np.float32]:
        """Return what the rows stand for, float32 (rows, columns)."""
        length = formats.row_weights(self.type_name, self.rows.shape[1])
        return decode_rows(self.type_name, self.rows, length)


def measure(
    pieces: Sequence[Piece], names: Sequence[Sequence[str]], encoder: str
) -> list[_core.RowStats]:
    """Return what _core.measure finds in each piece, in the formats named for it."""
    pieces = [piece.readable() for piece in pieces]
    jobs = [
        [(wanted, piece.type_name, piece.rows[p], w) for p, w in piece.plain_parts()]
        for piece, wanted in zip(pieces, names, strict=True)
    ]
    return _found(
        jobs,
        partial(_core.measure_many, encoder=ENCODERS[encoder].kernel),
        lambda i: pieces[i].scale._measure_outputs(
            names[i], pieces[i].type_name, pieces[i].rows, encoder
        ),
    )


def encode(
    pieces: Sequence[Piece], to: Sequence[str], blocks: Sequence[Rows], encoder: str
) -> None:
    """Fill the blocks of every piece, uint8 (rows, bytes), with its rows in the format named."""
    chosen = ENCODERS[encoder]
    pieces = [piece.readable() for piece in pieces]
    jobs: list[tuple[str, str, Rows, Rows, Importance]] = []
    for piece, name, out in zip(pieces, to, blocks, strict=True):
        scale = piece.scale
        if scale.hessian is not None and chosen.encode_output and chosen.encodes_output(name):
            assert scale.importance is not None  # wherever there is a Hessian
            out[:] = chosen.encode_output(
                name, piece.weights(), scale.hessian(), scale.importance[0]
            )
        elif not formats.get(name).encodable:
            weights = piece.weights()
            for part, importance in piece.parts():
                out[part] = libggml.encode(name, weights[part], importance)
        else:
            jobs += [(name, piece.type_name, piece.rows[p], out[p], w) for p, w in piece.parts()]
    _core.encode_many(jobs, encoder=chosen.kernel)


def compare(
    pieces: Sequence[Piece], to: Sequence[str], after: Sequence[Rows]
) -> list[_core.RowStats]:
    """Return the error of the rows `after`, of the types named, against each piece."""
    pieces = [piece.readable() for piece in pieces]
    jobs = []
    for piece, name, rows in zip(pieces, to, after, strict=True):
        parts = list(piece.plain_parts())
        known, decoded = readable(name, rows) if parts else (name, rows)
        jobs.append([(piece.type_name, piece.rows[p], known, decoded[p], w) for p, w in parts])
    return _found(
        jobs,
        _core.compare_many,
        lambda i: pieces[i].scale._compare_outputs(
            pieces[i].type_name, pieces[i].rows, pieces[i].weights(), to[i], after[i]
        ),
    )


def _found(
    jobs: Sequence[Sequence[Job]],
    run: Callable[[list[Job]], list[_core.RowStats]],
    of_outputs: Callable[[int], _core.RowStats],
) -> list[_core.RowStats]:
    """Return what run finds in the jobs of every piece; of_outputs(i), where the i-th has none."""
    found = iter(run([job for own in jobs for job in own]))
    return [
        _merged(list(islice(found, len(own)))) if own else of_outputs(i)
        for i, own in enumerate(jobs)
    ]


def tensor_weights(
    file: GGUFFile, source: ImportanceSource | None, encoded: Sequence[bool]
) -> list[ErrorWeights]:
    """Return the error weights of every tensor: the matrix, where the tensor is encoded."""
    imatrix = planned_imatrix(source)
    return [
        ErrorWeights.of(t, imatrix if changed else None)
        for t, changed in zip(file.tensors, encoded, strict=True)
    ]


def is_sampled(type_name: str, scale: ErrorWeights) -> bool:
    """Return whether the format's error is measured on a sample of the tensor's rows.

    That is so where libggml encodes it, unless a Hessian tells the error.
    """
    return not formats.get(type_name).encodable and scale.hessian is None


def _merged(parts: list[_core.RowStats]) -> _core.RowStats:
    return parts[0] if len(parts) == 1 else _core.RowStats.merged(parts)
