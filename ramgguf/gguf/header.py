"""What GGUF headers are made of: ggml's tensor types, and metadata values with their encoding."""

import enum
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.errors import GGUFError


@dataclass(frozen=True, slots=True)
class GGMLType:
    """A type of tensor data: rows are whole blocks, of block_weights weights in block_bytes."""

    name: str
    id: int
    block_weights: int
    block_bytes: int

    def n_bytes(self, n_weights: int) -> int:
        """Return the bytes of n_weights weights in rows of whole blocks."""
        return n_weights // self.block_weights * self.block_bytes


# The gguf package's, and formats of ours that it does not know yet.
GGML_TYPES: Mapping[str, GGMLType] = {
    f.name: GGMLType(f.name, f.type_id, f.block_size, f.block_bytes) for f in _core.formats()
} | {t.name: GGMLType(t.name, int(t), *sizes) for t, sizes in GGML_QUANT_SIZES.items()}
GGML_TYPES_BY_ID: Mapping[int, GGMLType] = {t.id: t for t in GGML_TYPES.values()}


def ggml_type(name: str) -> GGMLType:
    """Return the ggml type of that name; raises GGUFError if there is none."""
    try:
        return GGML_TYPES[name]
    except KeyError:
        raise GGUFError(f"{name!r} is no ggml type; known are {', '.join(GGML_TYPES)}") from None


class ValueType(enum.IntEnum):
    """The types of metadata values, numbered as in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES: Mapping[ValueType, np.dtype[Any]] = {
    t: np.dtype(name)
    for t, name in (
        (ValueType.UINT8, "<u1"),
        (ValueType.INT8, "<i1"),
        (ValueType.UINT16, "<u2"),
        (ValueType.INT16, "<i2"),
        (ValueType.UINT32, "<u4"),
        (ValueType.INT32, "<i4"),
        (ValueType.FLOAT32, "<f4"),
        (ValueType.BOOL, "?"),
        (ValueType.UINT64, "<u8"),
        (ValueType.INT64, "<i8"),
        (ValueType.FLOAT64, "<f8"),
    )
}

_INTEGERS = frozenset(t for t, dtype in _DTYPES.items() if dtype.kind in "iu")
MOST_CHARACTERS = 1 << 20  # of a string that is looked up: templates have tens of thousands
Scalar = int | float | bool | str
MetadataValue = Scalar | NDArray[Any] | tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """A metadata value to be written: a scalar or a string, with its type."""

    type: ValueType
    value: Scalar

    def record(self, key: str) -> bytes:
        """Return the bytes of the whole key/value record."""
        name = key.encode()
        head = struct.pack("<Q", len(name)) + name + struct.pack("<I", self.type)
        if self.type == ValueType.STRING:
            text = str(self.value).encode()
            return head + struct.pack("<Q", len(text)) + text
        try:
            packed = np.array(self.value, dtype=_DTYPES[self.type])
            if packed.dtype.kind in "iu" and packed.item() != self.value:
                raise OverflowError  # before NumPy 2 integers wrap around
            return head + packed.tobytes()
        except (KeyError, OverflowError, ValueError):
            raise GGUFError(f"key {key!r}: {self.value!r} is no {self.type.name}") from None


def u16(value: int) -> Value:
    """Return a uint16 to be written."""
    return Value(ValueType.UINT16, value)


def u32(value: int) -> Value:
    """Return a uint32 to be written."""
    return Value(ValueType.UINT32, value)


def u64(value: int) -> Value:
    """Return a uint64 to be written."""
    return Value(ValueType.UINT64, value)


def i32(value: int) -> Value:
    """Return an int32 to be written."""
    return Value(ValueType.INT32, value)


def string(value: str) -> Value:
    """Return a string to be written."""
    return Value(ValueType.STRING, value)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: shape is in ggml's order (row length first), offset is absolute in its shard."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    type_id: int
    n_bytes: int
    shard: int
    offset: int
    row_length: int = field(init=False, compare=False, repr=False)
    n_rows: int = field(init=False, compare=False, repr=False)
    row_bytes: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Looked up for every chunk of every stage.
        row_length, *others = self.shape
        n_rows = math.prod(others)
        object.__setattr__(self, "row_length", row_length)
        object.__setattr__(self, "n_rows", n_rows)
        object.__setattr__(self, "row_bytes", self.n_bytes // n_rows)

    @property
    def n_weights(self) -> int:
        return self.row_length * self.n_rows

    @property
    def n_experts(self) -> int:
        """The product of the dimensions after the second: experts, or heads."""
        return math.prod(self.shape[2:])


class KeySpan(NamedTuple):
    """Where a key/value record lies in the file: [begin, end), its value from value_begin."""

    key: str
    type: int
    item_type: int
    n_items: int
    begin: int
    value_begin: int
    end: int


def _text(raw: bytes) -> str:
    # Tokens may hold any bytes; \xNN keeps them readable and printable.
    return raw.decode("utf-8", errors="backslashreplace")


def _strings(header: bytes, offset: int, count: int) -> Iterator[str]:
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", header, offset)
        offset += 8
        yield _text(header[offset : offset + length])
        offset += length


def decode(header: bytes, span: KeySpan) -> MetadataValue:
    """Return the value of a scanned record: numeric arrays as read-only views, strings as str."""
    kind = ValueType(span.type)
    if kind == ValueType.STRING:
        return _text(header[span.value_begin + 8 : span.end])
    if kind != ValueType.ARRAY:
        scalar: Scalar = np.frombuffer(header, _DTYPES[kind], 1, span.value_begin)[0].item()
        return scalar
    item_type, items = ValueType(span.item_type), span.value_begin + 12
    if item_type == ValueType.STRING:
        return tuple(_strings(header, items, span.n_items))
    if item_type == ValueType.BOOL:  # any byte but zero is true
        flags: NDArray[np.bool_] = np.frombuffer(header, np.uint8, span.n_items, items) != 0
        return flags
    return np.frombuffer(header, _DTYPES[item_type], span.n_items, items)


class Metadata(Mapping[str, MetadataValue]):
    """The key/value pairs of a header, decoded when asked for."""

    def __init__(self, header: bytes, spans: Iterable[KeySpan]) -> None:
        self._header = header
        self._spans = {span.key: span for span in spans}

    def __getitem__(self, key: str) -> MetadataValue:
        return decode(self._header, self._spans[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def integer(self, key: str) -> int | None:
        """Return an integer value; None if the key is missing or not an integer."""
        value = self[key] if self._kind(key) in _INTEGERS else None
        return value if isinstance(value, int) else None

    def flag(self, key: str) -> bool | None:
        """Return a boolean value; None if the key is missing or not a boolean."""
        value = self[key] if self._kind(key) == ValueType.BOOL else None
        return value if isinstance(value, bool) else None

    def string(self, key: str, most: int = MOST_CHARACTERS) -> str | None:
        """Return a string value, cut to `most` characters; None if the key holds no string."""
        if self._kind(key) != ValueType.STRING:
            return None
        span = self._spans[key]
        begin = span.value_begin + 8
        # A character takes 4 bytes at most, and more is not decoded than is returned.
        return _text(self._header[begin : min(span.end, begin + 4 * most)])[:most]

    def numbers(self, key: str) -> NDArray[Any] | None:
        """Return an array of numbers, a view; None if the key is missing or something else."""
        value = self[key] if self._item_kind(key) not in (None, ValueType.STRING) else None
        return value if isinstance(value, np.ndarray) else None

    def strings(self, key: str, most: int | None = None) -> tuple[str, ...] | None:
        """Return an array of strings, or its first `most`; None if the key is something else."""
        if self._item_kind(key) != ValueType.STRING:
            return None
        span = self._spans[key]
        count = span.n_items if most is None else min(most, span.n_items)
        return tuple(_strings(self._header, span.value_begin + 12, count))

    def _kind(self, key: str) -> int | None:
        # Looked at before anything is decoded: any key may hold an array of millions.
        span = self._spans.get(key)
        return None if span is None else span.type

    def _item_kind(self, key: str) -> int | None:
        span = self._spans.get(key)
        return span.item_type if span is not None and span.type == ValueType.ARRAY else None

    @cached_property
    def types(self) -> Mapping[str, ValueType]:
        """The value type of every key."""
        return {key: ValueType(span.type) for key, span in self._spans.items()}

    def record(self, key: str) -> bytes:
        """Return the bytes of the key's whole record, as they stand in the file."""
        span = self._spans[key]
        return self._header[span.begin : span.end]
