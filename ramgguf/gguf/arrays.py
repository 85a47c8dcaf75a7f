"""GGUF files of float32 arrays that are no models: importance matrices, Hessians and scales."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import RamggufError
from ramgguf.core.files import AtomicFile, remove_orphans, require_disk_space
from ramgguf.gguf.header import Value, ValueType

_VERSION, _ALIGNMENT, _F32 = 3, 32, 0

Keys = Mapping[str, Value | tuple[str, ...]]
Shapes = Mapping[str, tuple[int, ...]]


class ArrayFile:
    """A new GGUF file with these metadata and room for arrays of these shapes (numpy's order).

    A context manager: what was not committed is removed. Raises `error` when the file exists and
    force is not given, or cannot be written.
    """

    def __init__(
        self, path: Path, keys: Keys, shapes: Shapes, *, force: bool, error: type[RamggufError]
    ) -> None:
        head, self._offsets = _header(keys, shapes)
        self._shapes = shapes
        n_data = sum(_padded(4 * math.prod(shape)) for shape in shapes.values())
        require_disk_space(path.parent, len(head) + n_data, error=error)
        remove_orphans(path.parent)
        self._file = AtomicFile(path, len(head) + n_data, force=force, error=error)
        try:
            self._file.write_at(0, head)
        except BaseException:
            self._file.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.abort()

    def write(self, name: str, array: NDArray[np.float32]) -> None:
        """Write one array; those that are never written stay zero."""
        data = np.ascontiguousarray(array, "<f4")
        if data.shape != self._shapes[name]:
            raise ValueError(f"{name} has shape {data.shape}, planned was {self._shapes[name]}")
        self._file.write_at(self._offsets[name], data.data)

    def commit(self) -> None:
        """Flush the file and give it its name."""
        self._file.commit()


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _record(key: str, value: Value | tuple[str, ...]) -> bytes:
    if isinstance(value, Value):
        return value.record(key)
    head = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
    return _string(key) + head + b"".join(_string(text) for text in value)


def _header(keys: Keys, shapes: Shapes) -> tuple[bytes, dict[str, int]]:
    """Return the header, padded, and each array's absolute offset."""
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(shapes), len(keys))]
    parts += [_record(key, value) for key, value in keys.items()]
    offsets: dict[str, int] = {}
    at = 0
    for name, shape in shapes.items():
        offsets[name] = at
        n_dimensions = len(shape)
        parts.append(_string(name))
        parts.append(struct.pack(f"<I{n_dimensions}QIQ", n_dimensions, *shape[::-1], _F32, at))
        at += _padded(4 * math.prod(shape))
    head = b"".join(parts)
    head += bytes(_padded(len(head)) - len(head))
    return head, {name: len(head) + offset for name, offset in offsets.items()}
