"""Importance matrices as llama-imatrix writes them: how much each column of a weight counts.

The importance of a column is the mean square of its input while a text was read. Two formats are
read: GGUF (for every weight `NAME.in_sum2` and `NAME.counts`, one row per expert) and the older
.dat (tools/imatrix/imatrix.cpp of llama.cpp, save_imatrix and save_imatrix_legacy).
"""

import hashlib
import math
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.documents import FrozenModel, NonNegative, Positive
from ramgguf.core.errors import ImatrixError, PlanError
from ramgguf.core.inputs import reading
from ramgguf.core.units import format_count
from ramgguf.gguf.architecture import same_columns, sharers
from ramgguf.gguf.arrays import ArrayFile, Keys
from ramgguf.gguf.header import Value, string, u32
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants.encoders import DEFAULT_ENCODER, ENCODERS
from ramgguf.quants.hessian import MODEL_SAMPLE_KEY, STAND_IN_KEY, Hessians, load_hessians
from ramgguf.quants.scales import Scales, load_scales


class ImportanceSource(FrozenModel):
    """Which importance matrix weighed the errors; n_entries and n_chunks are as the file says.

    With a file of Hessians, errors are those of the outputs where it has an entry. With scales,
    columns are multiplied, and their importance divided, which leaves weighted errors as they are.
    """

    path: str
    sha256: str
    dataset: str | None = None
    n_entries: Positive
    n_chunks: NonNegative | None = None
    hessian_path: str | None = None
    hessian_sha256: str | None = None
    scales_path: str | None = None
    scales_sha256: str | None = None

    @property
    def identity(self) -> str:
        """The identity of these error weights: errors with different ones must not be compared."""
        return f"{self.sha256} {self.hessian_sha256}" if self.hessian_sha256 else self.sha256

    @property
    def encoding(self) -> str:
        """The identity of what decides an encoder's bytes: error weights, and scales."""
        return f"{self.identity} {self.scales_sha256}" if self.scales_sha256 else self.identity


_SUMS, _COUNTS = ".in_sum2", ".counts"
_LARGEST_FILE = 1 << 32  # that of a 1000B model has under 1 GiB
_LONGEST_NAME = 1 << 12
_LARGEST = 1e30  # mean square
_MOST_DATASETS = 64  # the first is named


@dataclass(frozen=True)
class Importance:
    """The importance of the columns of one weight, per expert.

    values has shape (n_experts, n_columns), float32, finite and not negative; n_experts is 1 for a
    weight of two dimensions. n_unused tells how many experts saw no token; they have the mean of
    the others.
    """

    name: str
    values: NDArray[np.float32]
    n_unused: int = 0


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: entries by the weight's name, and where they come from.

    hessians, where there are any, say how the inputs of a weight go together. model_sample is the
    sample_sha256 of the model that it was made from, where the file says that (calibrate's do).
    Where there are scales, entries are of the inputs that these leave.
    """

    path: Path
    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    n_chunks: int | None = None
    hessians: Hessians | None = None
    model_sample: str | None = None
    scales: Scales | None = None

    @cached_property
    def source(self) -> ImportanceSource:
        """What measurements and plans say of the matrix."""
        return ImportanceSource(
            path=str(self.path),
            sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            dataset=self.datasets[0] if self.datasets else None,
            n_entries=len(self.entries),
            n_chunks=self.n_chunks,
            hessian_path=str(self.hessians.path) if self.hessians else None,
            hessian_sha256=self.hessians.sha256 if self.hessians else None,
            scales_path=str(self.scales.path) if self.scales else None,
            scales_sha256=self.scales.sha256 if self.scales else None,
        )

    def importance(self, name: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """Return the importance of a tensor's columns, or None where there is no entry.

        shape is in ggml's order, row length first. The result has shape (n_experts, row length),
        where n_experts is the product of the dimensions after the second. Raises ImatrixError when
        the tensor's own entry is for another shape; one of a tensor that reads the same activations
        serves only where it fits.
        """
        found = self.entry_for(name, shape)
        if found is None:
            return None
        n_columns, n_experts = shape[0], math.prod(shape[2:])
        values = _fitted(found, n_columns, n_experts)
        if values is not None:
            return values
        raise ImatrixError(
            f"{self.path}: entry {name!r} has {found.values.size} values, but the tensor has "
            f"{n_experts} x {n_columns} columns; was it made with another model?"
        )

    def entry_for(self, name: str, shape: Sequence[int]) -> Importance | None:
        """Return the tensor's entry, or that of one that reads the same activations; else None.

        Q, K, V and what fuses them read the same, so do gate and up: whichever of them the matrix
        names serves the others, whether the model's are fused or apart. kv_b and v_b of latent
        attention serve each other: their inputs have the same columns.
        """
        own = self.entries.get(name)
        if own is not None:
            return own
        n_columns, n_experts = shape[0], math.prod(shape[2:])
        others = (self.entries.get(other) for other in sharers(name))
        fit = (e for e in others if e and _fitted(e, n_columns, n_experts) is not None)
        return next(fit, None) or self._of_same_columns(name, n_columns, n_experts)

    def _of_same_columns(self, name: str, n_columns: int, n_heads: int) -> Importance | None:
        """Return the entry of the other factor of latent attention; a matrix for all heads gets the
        mean of theirs.
        """
        other = same_columns(name)
        entry = None if other is None else self.entries.get(other)
        if entry is None or entry.values.shape[-1] != n_columns:
            return None
        if n_heads == 1:
            entry = replace(entry, values=entry.values.mean(axis=0, keepdims=True))
        return entry if _fitted(entry, n_columns, n_heads) is not None else None


def _fitted(entry: Importance, n_columns: int, n_experts: int) -> NDArray[np.float32] | None:
    """Return the values as (n_experts, n_columns); None where there are not so many."""
    if entry.values.size == n_columns * n_experts:
        return entry.values.reshape(n_experts, n_columns)
    if entry.values.shape == (1, n_columns):
        return np.broadcast_to(entry.values, (n_experts, n_columns))
    return None


# How ggml names a copy of a tensor on a backend, and views of it.
_COPY = re.compile(r"^[^#]*#(?P<name>[^#]+)#\d+$")
_VIEW = re.compile(r"(?: \((?:view|reshaped|permuted|transposed|cont|copy)\))+$")


def plain_name(name: str) -> str:
    """Return the tensor that an entry is of: 'CUDA0#blk.0.attn_q.weight#0' is a copy of one."""
    copy = _COPY.match(name)
    return _VIEW.sub("", copy["name"] if copy else name)


def imatrix_keys(source: ImportanceSource) -> Mapping[str, Value]:
    """Return the metadata that records the matrix in a model, as llama-quantize writes them."""
    keys = {"quantize.imatrix.file": string(source.path)}
    if source.dataset is not None:
        keys["quantize.imatrix.dataset"] = string(source.dataset)
    keys["quantize.imatrix.entries_count"] = u32(source.n_entries)
    if source.n_chunks is not None:
        keys["quantize.imatrix.chunks_count"] = u32(source.n_chunks)
    return keys


def planned_imatrix(source: ImportanceSource | None) -> Imatrix | None:
    """Return the matrix that a plan was made with; raises ImatrixError when it has changed."""
    if source is None:
        return None
    hessian, scales = (
        Path(path) if path else None for path in (source.hessian_path, source.scales_path)
    )
    imatrix = load_imatrix(Path(source.path), hessian, scales)
    now = imatrix.source
    if now.encoding != source.encoding:
        differs = now.sha256 != source.sha256, now.hessian_sha256 != source.hessian_sha256
        paths = source.path, source.hessian_path, source.scales_path
        which = next(compress(paths, (*differs, True)))
        raise ImatrixError(f"{which}: is another file than the plan was made with; plan again")
    return imatrix


def load_imatrix(path: Path, hessian: Path | None = None, scales: Path | None = None) -> Imatrix:
    """Return the importance matrix in the file, GGUF or .dat, with the Hessians of another file.

    With scales, both are of the scaled model. Raises ImatrixError or GGUFError that say what is
    wrong.
    """
    if scales is not None:
        return scaled(load_imatrix(path, hessian), load_scales(scales))
    if hessian is not None:
        return replace(load_imatrix(path), hessians=load_hessians(hessian))
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImatrixError(f"{path}: is not a regular file")
            n_bytes = status.st_size
            if n_bytes > _LARGEST_FILE:
                raise ImatrixError(f"{path}: has {n_bytes} bytes; this is no importance matrix")
            reading(path)
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            data = b"" if is_gguf else file.read(_LARGEST_FILE)
    except OSError as e:
        raise ImatrixError(f"{path}: cannot be read: {e.strerror}") from None
    if not is_gguf:
        return _read_legacy(path, data)
    with open_gguf(path) as gguf:
        return _read_gguf(path, gguf)


def scaled(imatrix: Imatrix, scales: Scales) -> Imatrix:
    """Return the matrix, and its Hessians, of the model with these scales."""

    def of_scaled(name: str, entry: Importance) -> Importance:
        divisor = scales.of_inputs(name)
        if divisor is None:
            return entry
        n_columns = divisor.shape[-1]
        # Of experts, an older matrix holds all in one row, and another may hold one for all.
        values = entry.values.reshape(-1, n_columns if entry.values.size % n_columns == 0 else 1)
        if divisor.ndim == 1 and values.shape[1] == n_columns:
            return replace(entry, values=values / divisor**2)
        if divisor.ndim == 2 and values.shape in (divisor.shape, (1, n_columns)):
            return replace(entry, values=values / divisor**2)
        raise ImatrixError(
            f"{scales.path}: has {divisor.size} scales for {name!r}, and {imatrix.path} "
            f"{entry.values.size} columns"
        )

    hessians = imatrix.hessians
    return replace(
        imatrix,
        entries={name: of_scaled(name, entry) for name, entry in imatrix.entries.items()},
        hessians=None if hessians is None else replace(hessians, divided_by=scales.of_inputs),
        scales=scales,
    )


# --- GGUF ---


def _read_gguf(path: Path, file: GGUFFile) -> Imatrix:
    kind = file.metadata.string("general.type")
    if kind != "imatrix":
        raise ImatrixError(f"{path}: general.type is {kind!r}, expected 'imatrix'")
    names = [t.name.removesuffix(_SUMS) for t in file.tensors if t.name.endswith(_SUMS)]
    entries: dict[str, Importance] = {}
    for name in names:
        counts = _floats(path, file, name + _COUNTS)
        sums = _floats(path, file, name + _SUMS)
        if len(counts) not in (1, len(sums)) or counts.shape[1] != 1:
            raise ImatrixError(
                f"{path}: entry {name!r} has sums for {len(sums)} experts, but counts of "
                f"shape {counts.shape}"
            )
        entry = _mean_squares(plain_name(name), sums, counts)
        if entry is not None:
            entries.setdefault(entry.name, entry)
    datasets = file.metadata.strings("imatrix.datasets", _MOST_DATASETS)
    return Imatrix(
        path=path,
        entries=_some(path, entries),
        datasets=datasets or (),
        n_chunks=_count(file.metadata.integer("imatrix.chunk_count")),
        model_sample=file.metadata.string(MODEL_SAMPLE_KEY),
    )


def _floats(path: Path, file: GGUFFile, name: str) -> NDArray[np.float64]:
    """Return an F32 tensor as rows, checked to be finite and not negative."""
    tensor = next((t for t in file.tensors if t.name == name), None)
    if tensor is None:
        raise ImatrixError(f"{path}: tensor {name!r} is missing; was the file cut short?")
    if tensor.type_name != "F32":
        raise ImatrixError(f"{path}: tensor {name!r} is {tensor.type_name}, expected F32")
    rows = _doubles(file.read_rows(tensor, 0, tensor.n_rows).view("<f4"))
    _check(path, name, rows)
    return rows


def _mean_squares(
    name: str, sums: NDArray[np.float64], counts: NDArray[np.float64]
) -> Importance | None:
    """Return the means; None when no expert saw a token."""
    seen = np.broadcast_to(counts[:, 0] > 0, len(sums))
    if not seen.any():
        return None
    means = sums / np.where(counts > 0, counts, 1)
    means[~seen] = means[seen].mean(axis=0)
    # What is left above is not a mean square of activations, and rows of it have no sum in float32.
    values = np.minimum(means, _LARGEST).astype(np.float32)
    return Importance(name, values, n_unused=int((~seen).sum()))


# --- .dat ---


class _Bytes:
    """A file's bytes, taken from the front; never beyond its end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path, self._data, self._at = path, memoryview(data), 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, n_bytes: int, what: str) -> memoryview:
        if not 0 <= n_bytes <= self.left():
            raise ImatrixError(
                f"{self._path}: {what} would take {n_bytes} bytes at byte {self._at} of "
                f"{len(self._data)}; this is no importance matrix, or it was cut short"
            )
        self._at += n_bytes
        return self._data[self._at - n_bytes : self._at]

    def integer(self, what: str) -> int:
        (value,) = struct.unpack("<i", self.take(4, what))
        return int(value)

    def text(self, what: str) -> str:
        n_bytes = self.integer(f"the length of {what}")
        if n_bytes > _LONGEST_NAME:
            raise ImatrixError(f"{self._path}: {what} has {n_bytes} bytes; this cannot be")
        return str(self.take(n_bytes, what), "utf-8", errors="backslashreplace")


def _read_legacy(path: Path, data: bytes) -> Imatrix:
    """Read int32 n; n times a name, int32 calls, int32 count, floats; int32 chunks; a data set."""
    source = _Bytes(path, data)
    entries: dict[str, Importance] = {}
    for i in range(source.integer("the number of entries")):
        name = plain_name(source.text(f"the name of entry {i}"))
        if name in entries:
            raise ImatrixError(f"{path}: entry {name!r} is there twice")
        n_calls = source.integer(f"the calls of {name!r}")
        n_values = source.integer(f"the size of {name!r}")
        raw = source.take(4 * n_values, f"entry {name!r}")
        if n_values == 0:
            raise ImatrixError(f"{path}: entry {name!r} is empty")
        values = _doubles(np.frombuffer(raw, "<f4")) / max(n_calls, 1)
        _check(path, name, values)
        # One row: which values belong to which expert is known from the tensor's shape only.
        entries[name] = Importance(name, values.astype(np.float32)[None])
    n_chunks = source.integer("the number of chunks") if source.left() else None
    dataset = source.text("the data set's name") if source.left() else ""
    if source.left():
        raise ImatrixError(
            f"{path}: the matrix ends {format_count(source.left(), 'byte')} before the file"
        )
    return Imatrix(path, _some(path, entries), (dataset,) if dataset else (), _count(n_chunks))


# --- both ---


def _doubles(values: NDArray[np.float32]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # a signalling NaN; it is refused by _check
        return values.astype(np.float64)


def _check(path: Path, name: str, values: NDArray[np.float64]) -> None:
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        first = int(np.argmax(bad.reshape(-1)))
        found = values.reshape(-1)[first]
        raise ImatrixError(f"{path}: {name!r} holds {found} at {first}; expected a mean square")


def _some(path: Path, entries: Mapping[str, Importance]) -> Mapping[str, Importance]:
    if not entries:
        raise ImatrixError(f"{path}: there are no entries; this is no importance matrix")
    return entries


def _count(n: int | None) -> int | None:
    return n if n is not None and 0 <= n < 2**32 else None


def load_importance(
    imatrix: str | Path | None,
    hessian: str | Path | None = None,
    encoder: str = DEFAULT_ENCODER,
    scales: str | Path | None = None,
) -> Imatrix | None:
    """Return the importance matrix of the file with the Hessians of the other, None without.

    With scales, both are of the scaled model. Raises PlanError when the encoder needs Hessians,
    ImatrixError when these or scales stand alone.
    """
    if ENCODERS[encoder].needs_hessian and hessian is None:
        raise PlanError(f"the encoder {encoder} needs Hessians; make them with calibrate --hessian")
    if imatrix is None:
        if hessian is not None:
            raise ImatrixError("Hessians need the importance matrix that was made with them")
        if scales is not None:
            raise ImatrixError("scales need the importance matrix that they were made from")
        return None
    others = (Path(path) if path is not None else None for path in (hessian, scales))
    return load_imatrix(Path(imatrix), *others)


@dataclass(frozen=True)
class InputSquares:
    """Σx² of a weight's input, (n_experts, n_columns), and the number of inputs of each expert.

    counts has one entry per expert, or a single one for all.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


def write_imatrix(
    path: Path,
    entries: Mapping[str, InputSquares],
    *,
    dataset: str,
    n_chunks: int,
    chunk_size: int,
    model_sample: str | None = None,
    stand_in: str | None = None,
    force: bool,
) -> None:
    """Write the matrix; names are stored in order, weights without inputs are left out.

    model_sample is the sample_sha256 of the model, to which the matrix is then bound; stand_in the
    format of the stand-in that read the tokens.

    Raises ImatrixError when no weight had inputs, a sum is not finite, or writing fails.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(entries):
        entry = entries[name]
        if not np.isfinite(entry.sums).all():
            raise ImatrixError(f"{name}: its inputs are NaN or infinite; is the model damaged?")
        if entry.counts.any():
            # A float's range is enough: what is beyond it is no sum of squares of activations.
            limit = float(np.finfo(np.float32).max)
            arrays[f"{name}.in_sum2"] = np.minimum(entry.sums, limit).astype(np.float32)
            arrays[f"{name}.counts"] = entry.counts.astype(np.float32)[:, None]
    if not arrays:
        raise ImatrixError(f"{path}: no weight has any input; is it a language model?")
    keys: Keys = {
        "general.type": string("imatrix"),
        "imatrix.datasets": (dataset,),
        "imatrix.chunk_count": u32(n_chunks),
        "imatrix.chunk_size": u32(chunk_size),
        **({} if model_sample is None else {MODEL_SAMPLE_KEY: string(model_sample)}),
        **({} if stand_in is None else {STAND_IN_KEY: string(stand_in)}),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    with ArrayFile(path, keys, shapes, force=force, error=ImatrixError) as file:
        for name, array in arrays.items():
            file.write(name, array)
        file.commit()
