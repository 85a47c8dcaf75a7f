"""Scales of columns, and of the rows that make their inputs: a model that computes the same.

The columns of a weight that matter more are multiplied, and blocks round them with less error for
their size; what makes the inputs is divided (AWQ, Lin et al. 2023, arXiv 2306.00978). GGUF with
general.type `scales`: NAME.columns and NAME.rows, F32, what these of a tensor are multiplied with;
where each expert's columns have scales of their own, NAME.columns has a row for each.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import FormatError, GGUFError, ImatrixError
from ramgguf.core.parallel import by_expert
from ramgguf.gguf.architecture import sharers
from ramgguf.gguf.arrays import ArrayFile
from ramgguf.gguf.header import string
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.hessian import MODEL_SAMPLE_KEY

_KIND, _COLUMNS, _ROWS = "scales", ".columns", ".rows"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scales:
    """What the columns (n_columns,) and rows (n_rows,) of tensors are multiplied with, by name.

    Columns of experts that have scales of their own: (n_experts, n_columns). The rows of a tensor
    are those of all its experts.

    model_sample is the sample_sha256 of the model that they were made for.
    """

    path: Path
    columns: Mapping[str, Floats]
    rows: Mapping[str, Floats]
    model_sample: str

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def of_inputs(self, name: str) -> Floats | None:
        """Return what the inputs of a weight are divided by, as in columns; None: nothing.

        A weight without an entry has that of one that reads the same activations.
        """
        names = (name, *sharers(name))
        return next((self.columns[n] for n in names if n in self.columns), None)


def load_scales(path: Path) -> Scales:
    """Return the scales in the file. Raises ImatrixError or GGUFError when it holds none."""
    with open_gguf(path) as file:
        if (kind := file.metadata.string("general.type")) != _KIND:
            raise ImatrixError(f"{path}: general.type is {kind!r}, expected {_KIND!r}")
        sample = file.metadata.string(MODEL_SAMPLE_KEY)
        found: dict[str, dict[str, Floats]] = {_COLUMNS: {}, _ROWS: {}}
        for tensor in file.tensors:
            name, dot, which = tensor.name.rpartition(".")
            values = file.read_rows(tensor, 0, tensor.n_rows)
            is_fit = tensor.n_rows == 1 or (dot + which == _COLUMNS and len(tensor.shape) == 2)
            if dot + which not in found or tensor.type_name != "F32" or not is_fit:
                raise ImatrixError(f"{path}: {tensor.name!r} holds no scales")
            scales = values.view("<f4").astype(np.float32)
            if tensor.n_rows == 1:
                scales = scales[0]
            if not (np.isfinite(scales) & (scales > 0)).all():
                raise ImatrixError(f"{path}: {tensor.name!r} holds what is not above 0")
            found[dot + which][name] = scales
    if sample is None:
        raise ImatrixError(
            f"{path}: does not say of which model it is; make it with `ramgguf transform`"
        )
    return Scales(path, found[_COLUMNS], found[_ROWS], sample)


def write_scales(scales: Scales, *, force: bool) -> None:
    """Write the scales under their path. Raises ImatrixError where that cannot be done."""
    arrays = {name + _COLUMNS: values for name, values in scales.columns.items()}
    arrays |= {name + _ROWS: values for name, values in scales.rows.items()}
    keys = {"general.type": string(_KIND), MODEL_SAMPLE_KEY: string(scales.model_sample)}
    shapes = {name: array.shape for name, array in arrays.items()}
    with ArrayFile(scales.path, keys, shapes, force=force, error=ImatrixError) as file:
        for name, array in arrays.items():
            file.write(name, array)
        file.commit()


class ScaledFile(GGUFFile):
    """A model with scales in it, while it is read: its identity is that of the file itself.

    Rows come in the tensor's own type, one of F32, F16 and BF16, rounded once more.
    """

    def __init__(self, file: GGUFFile, scales: Scales) -> None:
        super().__init__(file.shards)
        self._scales = scales
        if scales.model_sample != file.sample_sha256:
            raise GGUFError(
                f"{scales.path}: is of another model than {file.paths[0]}; make it again from this "
                "model with `ramgguf transform`"
            )
        for names, shapes in ((scales.columns, _of_columns), (scales.rows, _of_rows)):
            for name, values in names.items():
                fit = shapes(self.tensor(name))
                if values.shape not in fit:
                    raise GGUFError(
                        f"{scales.path}: has {_size(values.shape)} scales for {name!r}, expected "
                        f"{' or '.join(map(_size, fit))}"
                    )

    def read_rows(
        self, tensor: TensorInfo, start: int, stop: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Return the scaled rows, as GGUFFile does."""
        rows = super().read_rows(tensor, start, stop, out)
        scaled = self._scaled(tensor, start, rows)
        if scaled is not rows:
            rows[:] = scaled
        return rows

    def read_ranges(
        self,
        ranges: Sequence[tuple[TensorInfo, int, int]],
        take: Callable[[int], NDArray[np.uint8]],
    ) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        """Return the scaled rows, and the bytes that were read, as they are in the file."""
        rows, read = super().read_ranges(ranges, take)
        scaled = [
            self._scaled(tensor, start, data)
            for (tensor, start, _), data in zip(ranges, rows, strict=True)
        ]
        return scaled, read

    def _scaled(self, tensor: TensorInfo, start: int, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        columns = self._scales.columns.get(tensor.name)
        each = self._scales.rows.get(tensor.name)
        if columns is None and each is None:
            return rows
        weights = decode_rows(tensor.type_name, rows, tensor.row_length)
        if columns is not None and columns.ndim == 1:
            weights *= columns
        elif columns is not None:
            per_expert = tensor.n_rows // len(columns)
            for expert, part in by_expert(start, start + len(rows), per_expert):
                weights[part] *= columns[expert]
        if each is not None:
            weights *= each[start : start + len(rows), None]
        try:
            return in_type(tensor.type_name, weights)
        except FormatError as e:
            raise GGUFError(
                f"{self.paths[tensor.shard]}: {tensor.name!r}, scaled as {self._scales.path} says: "
                f"{e}; quantize it without"
            ) from None


def with_scales(file: GGUFFile, scales: str | Path | None) -> GGUFFile:
    """Return the model with the scales of a file in it; without, the model as it is."""
    return file if scales is None else ScaledFile(file, load_scales(Path(scales)))


def _of_columns(tensor: TensorInfo) -> tuple[tuple[int, ...], ...]:
    """Return the shapes that scales of the tensor's columns may have."""
    shared = (tensor.row_length,)
    return (shared, (tensor.n_experts, *shared)) if tensor.n_experts > 1 else (shared,)


def _of_rows(tensor: TensorInfo) -> tuple[tuple[int, ...], ...]:
    return ((tensor.n_rows,),)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
