"""Safetensors files: where each tensor lies, and its values as NumPy has them.

A file is eight bytes with the length of a JSON header, the header, the data
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import CheckpointError
from ramgguf.core.inputs import reading
from ramgguf.gguf import other_files

_LONGEST_HEADER = 100_000_000  # as the format's own library allows
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # those of weights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: dtype is the format's name, bytes are counted in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    def values(self, mode: str = "r") -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
        """Return the mapped values; BF16 as its bits. Raises CheckpointError for other dtypes."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} is {self.dtype}; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        dtype = np.dtype(_DTYPES[self.dtype])
        if self.end - self.begin != self.n_weights * dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has {self.end - self.begin} bytes, expected "
                f"{self.n_weights * dtype.itemsize}"
            )
        kind = "r" if mode == "r" else "r+"
        # The stubs of NumPy 1 and 2 disagree on what memmap takes and returns.
        return np.memmap(self.path, dtype, kind, self.begin, self.shape)  # type: ignore[call-overload, no-any-return]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; CheckpointError for any other file."""
    reading(path)
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(_LONGEST_HEADER, n_bytes - 8):
                what = other_files.not_gguf(head + file.read(64))
                raise CheckpointError(f"{path}: {what or 'is no safetensors file'}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        found = {
            name: StoredTensor(
                name,
                path,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                *(8 + length + int(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise CheckpointError(f"{path}: its safetensors header is damaged: {e}") from None
    for tensor in found.values():
        lies_within = 8 + length <= tensor.begin <= tensor.end <= n_bytes
        if not lies_within or min(tensor.shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} lies outside the file of {n_bytes} bytes; was its "
                "download cut short?"
            )
    return found


def to_float(values: NDArray[np.generic], dtype: str) -> NDArray[np.float64]:
    """Return stored values of that dtype as float64."""
    if dtype == "BF16":
        bits = values.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def from_float(values: NDArray[np.float64], dtype: str) -> NDArray[np.generic]:
    """Return values as they are stored in that dtype: rounded to nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # beyond F16 is infinite, as in PyTorch
            return values.astype(_DTYPES[dtype])
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    # An even last bit would hide that digits were cut off: rounding twice must not make a tie.
    even = (single.view(np.uint32) & 1) == 0
    towards = np.where(values > single, np.inf, -np.inf).astype(np.float32)
    odd = np.nextafter(single, towards)
    bits = np.where(even & (single != values), odd, single).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
