"""What a GGUF output will hold, and where: every byte is counted before any is written.

The metadata of the source are carried over byte for byte, but for the keys that are overridden.
Tensors keep their order; their offsets are the padded running sum that ggml insists on.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.gguf.header import Value, ggml_type, i32, u16
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.shards import model_stem

_VERSION = 3
_MAX_SHARDS = 65535  # split.count is a uint16
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

Overrides = Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to be written; offset is absolute in its shard."""

    name: str
    type_name: str
    n_bytes: int
    shard: int
    offset: int


@dataclass(frozen=True)
class PlannedShard:
    """A file to be written: its header, where the data begin, and its whole length.

    What lies between is zero. A source may ask for an alignment of 2 GiB, so that padding is
    counted and never made.
    """

    path: Path
    header: bytes = field(repr=False)
    data_offset: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """Where every byte of an output goes."""

    shards: tuple[PlannedShard, ...]
    tensors: Mapping[str, PlannedTensor]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(s.n_bytes for s in self.shards)

    @property
    def header_bytes(self) -> int:
        """Bytes of all headers, padding included."""
        return sum(s.data_offset for s in self.shards)


def padded(n_bytes: int, alignment: int) -> int:
    """Return n_bytes rounded up to the alignment: what tensor data take in the file."""
    return -(-n_bytes // alignment) * alignment


def encoded_bytes(tensor: TensorInfo, type_name: str) -> int:
    """Return the tensor's bytes in that type; raises GGUFError if the rows are no whole blocks."""
    kind = ggml_type(type_name)
    if tensor.row_length % kind.block_weights:
        raise GGUFError(
            f"tensor {tensor.name!r} has rows of {tensor.row_length} weights, no multiple of the "
            f"{kind.block_weights} of {type_name}"
        )
    return kind.n_bytes(tensor.n_weights)


def metadata_records(source: GGUFFile, overrides: Overrides) -> list[bytes]:
    """Return the key/value records: the source's, overridden ones in their places, new ones."""
    kept = [key for key in source.metadata if key not in _SPLIT_KEYS]
    records = [
        overrides[key].record(key) if key in overrides else source.metadata.record(key)
        for key in kept
    ]
    return records + [value.record(key) for key, value in overrides.items() if key not in kept]


def _tensor_info(tensor: TensorInfo, type_id: int, offset: int) -> bytes:
    name = tensor.name.encode()
    return struct.pack(
        f"<Q{len(name)}sI{len(tensor.shape)}QIQ",
        len(name), name, len(tensor.shape), *tensor.shape, type_id, offset,
    )  # fmt: skip


def _info_bytes(tensor: TensorInfo) -> int:
    return 24 + len(tensor.name.encode()) + 8 * len(tensor.shape)


Sized = tuple[TensorInfo, str, int, int]  # a tensor, its type, its bytes, and these padded


def _pack(sized: list[Sized], first: int, others: int, alignment: int, limit: int) -> list[int]:
    """Return how many tensors each shard holds, filled in order up to limit bytes, one at least.

    first and others are the bytes of the header without tensor infos, of the first shard and the
    others.
    """
    counts = [0]
    header, data = first, 0
    for tensor, _, _, n_bytes in sized:
        info = _info_bytes(tensor)
        if counts[-1] and padded(header + info, alignment) + data + n_bytes > limit:
            counts.append(0)
            header, data = others, 0
        counts[-1] += 1
        header, data = header + info, data + n_bytes
    return counts


def sized(tensor: TensorInfo, type_name: str, alignment: int) -> Sized:
    """Return the tensor with what it takes in that type; raises GGUFError as encoded_bytes does."""
    n_encoded = encoded_bytes(tensor, type_name)
    return tensor, type_name, n_encoded, padded(n_encoded, alignment)


def split_records(number: int, count: int, n_tensors: int) -> list[bytes]:
    """Return the records that make a file shard `number` of so many, with n_tensors in all."""
    values = (u16(number), u16(count), i32(n_tensors))
    return [v.record(key) for key, v in zip(_SPLIT_KEYS, values, strict=True)]


def plan_shard(
    path: Path, number: int, records: Sequence[bytes], tensors: Sequence[Sized], alignment: int
) -> tuple[PlannedShard, list[PlannedTensor]]:
    """Return a file of these key/value records and tensors, and where in it each tensor goes."""
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(records)), *records]
    offset = 0
    for tensor, type_name, _, n_bytes in tensors:
        parts.append(_tensor_info(tensor, ggml_type(type_name).id, offset))
        offset += n_bytes
    header = b"".join(parts)
    data_offset = padded(len(header), alignment)
    planned, at = [], data_offset
    for tensor, type_name, n_encoded, n_bytes in tensors:
        planned.append(PlannedTensor(tensor.name, type_name, n_encoded, number, at))
        at += n_bytes
    return PlannedShard(path, header, data_offset, at), planned


def _shard_path(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{model_stem(path)}-{number + 1:05d}-of-{count:05d}.gguf")


def plan_layout(
    path: Path,
    source: GGUFFile,
    tensor_types: Mapping[str, str],
    overrides: Overrides,
    *,
    split_max_bytes: int | None = None,
) -> Layout:
    """Return where every byte of the output goes, the types of all tensors being known.

    Tensors that tensor_types does not name keep their type. With split_max_bytes, an output that
    exceeds it is written as shards of at most that size, unless a shard's first tensor alone is
    larger. Raises GGUFError for a type that does not suit its tensor.
    """
    for name in tensor_types:
        source.tensor(name)
    alignment = source.alignment
    if "general.alignment" in overrides:
        raise GGUFError("general.alignment is the source's; it cannot be overridden")
    tensors = [sized(t, tensor_types.get(t.name, t.type_name), alignment) for t in source.tensors]
    records = metadata_records(source, overrides)
    whole, planned = plan_shard(path, 0, records, tensors, alignment)
    if split_max_bytes is None or whole.n_bytes <= split_max_bytes:
        return Layout((whole,), {t.name: t for t in planned})

    # The other shards must be read with the first one's alignment.
    aligned = ["general.alignment"] if "general.alignment" in source.metadata else []
    carried = [source.metadata.record(key) for key in aligned]
    n = len(tensors)
    extra = 24 + sum(map(len, split_records(0, 0, n)))
    first, others = (extra + sum(map(len, own)) for own in (records, carried))
    counts = _pack(tensors, first, others, alignment, split_max_bytes)
    if len(counts) > _MAX_SHARDS:
        raise GGUFError(f"{path}: would be {len(counts)} shards; raise --split-max-size")
    shards, found, start = [], {}, 0
    for number, count in enumerate(counts):
        shard_path = _shard_path(path, number, len(counts))
        own = (carried if number else records) + split_records(number, len(counts), n)
        part = tensors[start : start + count]
        shard, planned = plan_shard(shard_path, number, own, part, alignment)
        shards.append(shard)
        found.update({t.name: t for t in planned})
        start += count
    return Layout(tuple(shards), found)


def planned_header_bytes(
    source: GGUFFile, tensor_types: Mapping[str, str], overrides: Overrides
) -> int:
    """Return the bytes of an unsplit output's header, padding included.

    The types do not change it; what they change are the tensors' padded bytes.
    """
    return plan_layout(Path("x.gguf"), source, tensor_types, overrides).header_bytes
