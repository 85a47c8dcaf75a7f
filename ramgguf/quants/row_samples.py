"""The error of formats that are slow to encode, measured on a sample of a tensor's rows.

ggml encodes some millions of weights per second, so not every row is tried. The same rows are
looked at again when the output is verified, where they must have the same error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.parallel import ordered_map
from ramgguf.core.progress import Progress
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders import libggml
from ramgguf.quants.encoders.decoding import decode_rows

MOST_ROWS = 512
# The error of 64 rows has a standard error of some two percent, where formats differ by tens.
_FEWEST_ROWS, _FEWEST_WEIGHTS = 64, 1 << 16

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SampledError:
    """Σ w(x−q)² / Σ w x² of the sampled rows, its standard error, and the largest |x−q|.

    plain_nmse is without w.
    """

    nmse: float
    standard_error: float
    max_error: float
    plain_nmse: float


def sampled_rows(n_rows: int, row_length: int, n_experts: int) -> Rows:
    """Return the indices of the rows to try, ascending: at most MOST_ROWS, every expert's share.

    One row is taken from each of as many stretches of equal length, at a place that moves by the
    golden ratio, so that no period of the rows (heads) is one of the sample.
    """
    wanted = max(_FEWEST_ROWS, _FEWEST_WEIGHTS // row_length, n_experts)
    n = min(n_rows, MOST_ROWS, wanted)
    i = np.arange(n)
    place = (i + 1) * ((math.sqrt(5) - 1) / 2) % 1
    rows: Rows = ((i + place) * (n_rows / n)).astype(np.int64)
    return np.minimum(rows, n_rows - 1)


def measure_sample(
    file: GGUFFile, tensor: TensorInfo, scale: ErrorWeights, name: str
) -> SampledError:
    """Return the error of a format of libggml; raises ValueError for weights that do not fit."""

    def encoded(x: Floats, importance: Floats, _: slice) -> Floats:
        weighed = None if scale.importance is None else importance
        blocks = libggml.encode(name, x, weighed)
        return libggml.decode(name, blocks, x.shape[1])

    return _sampled_error(file, tensor, scale, encoded)


def measure_samples(
    file: GGUFFile,
    tensors: Sequence[tuple[TensorInfo, ErrorWeights, Sequence[str]]],
    *,
    threads: int,
    progress: Progress,
) -> list[dict[str, SampledError | str]]:
    """Return for every tensor, by format, its error or why it cannot be encoded."""
    found: list[dict[str, SampledError | str]] = [{} for _ in tensors]
    work = [(i, name) for i, (_, _, names) in enumerate(tensors) for name in names]

    def measured(item: tuple[int, str]) -> SampledError | str:
        tensor, scale, _ = tensors[item[0]]
        try:
            return measure_sample(file, tensor, scale, item[1])
        except ValueError as e:
            return str(e)

    if not work:
        return found
    progress.start("measure samples", len(work), "points")
    try:
        for (i, name), error in zip(work, ordered_map(measured, work, threads), strict=True):
            found[i][name] = error
            progress.advance(1)
    finally:
        progress.finish()
    return found


def written_sample(
    file: GGUFFile, tensor: TensorInfo, scale: ErrorWeights, written: GGUFFile
) -> SampledError:
    """Return the error of the same rows as they are in another file."""
    target = written.tensor(tensor.name)

    def read(_: Floats, __: Floats, rows: slice) -> Floats:
        blocks = _read(written, target, sample[rows])
        return libggml.decode(target.type_name, blocks, target.row_length)

    sample = _sample_of(tensor, scale)
    return _sampled_error(file, tensor, scale, read)


def _sample_of(tensor: TensorInfo, scale: ErrorWeights) -> Rows:
    n_experts = 1 if scale.importance is None else len(scale.importance)
    return sampled_rows(tensor.n_rows, tensor.row_length, n_experts)


def _sampled_error(
    file: GGUFFile,
    tensor: TensorInfo,
    scale: ErrorWeights,
    decoded: Callable[[Floats, Floats, slice], Floats],
) -> SampledError:
    """Return the error of what decoded(rows, importance, which of the sample) gives for rows."""
    sample = _sample_of(tensor, scale)
    errors, squares = np.zeros(len(sample)), np.zeros(len(sample))
    plain, energy, largest = 0.0, 0.0, 0.0
    for rows, importance in _by_expert(sample, tensor.row_length, scale):
        x = decode_rows(tensor.type_name, _read(file, tensor, sample[rows]), tensor.row_length)
        off = x.astype(np.float64) - decoded(x, importance, rows)
        off_squared, x_squared = off**2, x.astype(np.float64) ** 2
        errors[rows], squares[rows] = off_squared @ importance, x_squared @ importance
        plain += float(off_squared.sum())
        energy += float(x_squared.sum())
        largest = max(largest, float(np.abs(off).max()))
    if not np.isfinite(errors).all():
        raise ValueError("its blocks decode to numbers that are not finite")
    nmse, error = _ratio(errors, squares, tensor.n_rows)
    return SampledError(nmse, error, largest, plain / energy if energy else 0.0)


def _ratio(
    errors: NDArray[np.float64], squares: NDArray[np.float64], n_rows: int
) -> tuple[float, float]:
    """Return Σ errors / Σ squares and its standard error (Cochran 1977, Sampling Techniques, 6.4).

    That is for rows drawn at random; drawn from stretches, they do a little better.
    """
    n, total = len(errors), float(squares.sum())
    if total == 0:
        return 0.0, 0.0
    nmse = float(errors.sum()) / total
    residuals = errors - nmse * squares
    unseen = 1 - n / n_rows
    variance = unseen * n / max(n - 1, 1) * float((residuals**2).sum())
    return nmse, math.sqrt(variance) / total


def _by_expert(
    sample: Rows, row_length: int, scale: ErrorWeights
) -> Iterator[tuple[slice, Floats]]:
    """Yield the slices of the sample that share an expert, with its importance: 1 without any."""
    if scale.importance is None:
        yield slice(0, len(sample)), np.ones(row_length, np.float32)
        return
    experts = sample // scale.rows_per_expert
    starts: Sequence[int] = [0, *(np.flatnonzero(np.diff(experts)) + 1).tolist(), len(sample)]
    for start, stop in pairwise(starts):
        yield slice(start, stop), np.ascontiguousarray(scale.importance[experts[start]])


def _read(file: GGUFFile, tensor: TensorInfo, rows: Rows) -> NDArray[np.uint8]:
    return np.concatenate([file.read_rows(tensor, int(r), int(r) + 1) for r in rows])
