"""A copy of a model in one shard per layer: it can be loaded from any layer on, as a model itself.

    shard 0        the metadata, and the tensors outside of layers
    shard 1 + k    the tensors of layer k

To start at layer s, headers are written anew: layer s becomes layer 0, block_count and arrays with
an entry per layer get shorter. Each header keeps its length by a padding key, so no data move.
"""

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.closing import Closing
from ramgguf.core.errors import EngineError
from ramgguf.core.files import require_disk_space
from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.gguf.header import TensorInfo, Value, ValueType, string
from ramgguf.gguf.layout import (
    Overrides,
    PlannedTensor,
    metadata_records,
    plan_shard,
    sized,
    split_records,
)
from ramgguf.gguf.reader import GGUFFile

_BLOCK = re.compile(r"^blk\.([0-9]+)\.")
_PADDING = "ramgguf.padding"
_OPEN_FILES = Path("/proc/self/fd")  # where a file without a name can be opened again

Rows = NDArray[np.uint8]
Convert = Callable[[TensorInfo, Rows, str], Rows]


@dataclass(frozen=True)
class _Shard:
    header: bytes
    tensors: list[PlannedTensor]
    n_bytes: int


class LayeredCopy(Closing):
    """The model's tensors in these types, in shards in `folder`; a context manager.

    convert gets a tensor, rows of it and the type, and returns the rows in that type. Where the
    system can open files without a name (Linux), the shards have none: nothing is left of them
    however this process ends. Elsewhere they lose their names with `unlink`, and start at layer 0
    only. Raises EngineError when the copy cannot be written.
    """

    def __init__(
        self,
        source: GGUFFile,
        folder: Path,
        types: Mapping[str, str],
        overrides: Overrides,
        convert: Convert,
        *,
        threads: int,
    ) -> None:
        self._source, self._types, self._overrides = source, types, overrides
        self._groups = _by_layer(source)
        self.start = 0
        self._is_nameless = _OPEN_FILES.is_dir()
        self._fds: list[int] = []
        self._header_bytes: list[int] = []
        shards = self._planned(0)
        self._header_bytes = [len(shard.header) for shard in shards]
        # By the source's names, whatever layer the copy starts at.
        self.places = {
            t.name: replace(t, shard=k) for k, shard in enumerate(shards) for t in shard.tensors
        }
        names = [f"copy-{k + 1:05d}-of-{len(shards):05d}.gguf" for k in range(len(shards))]
        self._paths = [folder / name for name in names]
        require_disk_space(folder, sum(s.n_bytes for s in shards), error=EngineError)
        try:
            self._write(shards, convert, threads)
            self.maps = tuple(np.memmap(path, np.uint8, mode="r+") for path in self._opened(0))
        except OSError as e:
            self.close()
            raise EngineError(f"{folder}: a copy cannot be written there: {e.strerror}") from None
        except BaseException:
            self.close()
            raise

    @property
    def n_layers(self) -> int:
        """Layers at which the copy can start; 1 where it cannot but at the first."""
        return max(1, len(self._groups) - 1) if self._is_nameless else 1

    @property
    def paths(self) -> tuple[Path, ...]:
        """The shards to load, in order."""
        return self._opened(self.start)

    def unlink(self) -> None:
        """Take the shards' names, once they are open; then nothing is left of them at the end."""
        for path in self._paths:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close and remove the shards."""
        self.unlink()
        while self._fds:
            os.close(self._fds.pop())

    def start_at(self, layer: int) -> None:
        """Make the shards the model from this layer on; the copy must not be loaded meanwhile."""
        if not 0 <= layer < self.n_layers:
            raise EngineError(f"a copy of {self.n_layers} layers cannot start at layer {layer}")
        for k, shard in zip(self._kept(layer), self._planned(layer), strict=True):
            os.pwrite(self._fds[k], shard.header, 0)
        self.start = layer

    def _opened(self, start: int) -> tuple[Path, ...]:
        if not self._is_nameless:
            return tuple(self._paths)
        return tuple(_OPEN_FILES / str(self._fds[k]) for k in self._kept(start))

    def _kept(self, start: int) -> list[int]:
        """Return the numbers of the groups in a model from this layer on."""
        return [0, *range(1 + start, len(self._groups))]

    def _planned(self, start: int) -> list[_Shard]:
        """Return the shards of the model from a layer on."""
        shards = []
        for number, k in enumerate(self._kept(start)):
            shard = self._shard(start, number, k, 0)
            if start:  # headers have become shorter
                padding = self._header_bytes[k] - len(shard.header)
                shard = self._shard(start, number, k, padding)
            shards.append(shard)
        return shards

    def _shard(self, start: int, number: int, k: int, padding: int) -> _Shard:
        """Return group k as shard `number` of the model from layer `start` on."""
        alignment = self._source.alignment
        if k == 0:
            records = _cut_records(self._source, self._overrides, start)
        elif "general.alignment" in self._source.metadata:
            records = [self._source.metadata.record("general.alignment")]
        else:
            records = []
        kept = self._kept(start)
        n_tensors = sum(len(self._groups[i]) for i in kept)
        records += split_records(number, len(kept), n_tensors)
        records.append(string("x" * padding).record(_PADDING))
        group = [
            sized(_renumbered(t, start), self._types.get(t.name, t.type_name), alignment)
            for t in self._groups[k]
        ]
        shard, planned = plan_shard(Path(), number, records, group, alignment)
        own = [replace(p, name=t.name) for p, t in zip(planned, self._groups[k], strict=True)]
        return _Shard(shard.header, own, shard.n_bytes)

    def _write(self, shards: Sequence[_Shard], convert: Convert, threads: int) -> None:
        for path, shard in zip(self._paths, shards, strict=True):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._fds.append(fd)
            if self._is_nameless:
                path.unlink()
            os.ftruncate(fd, shard.n_bytes)
            os.pwrite(fd, shard.header, 0)
        tensors = self._source.tensors

        def write(chunk: Chunk) -> None:
            tensor = tensors[chunk.index]
            place = self.places[tensor.name]
            rows = self._source.read_rows(tensor, chunk.start, chunk.stop)
            data = convert(tensor, rows, place.type_name)
            at = place.offset + chunk.start * data.shape[1]
            left = memoryview(np.ascontiguousarray(data).data).cast("B")
            while left:
                n = os.pwrite(self._fds[place.shard], left, at)
                left, at = left[n:], at + n

        for _ in map_chunks(write, runs(tensors), threads):
            pass
        self._source.require_unchanged()


def _by_layer(source: GGUFFile) -> list[list[TensorInfo]]:
    """Return the tensors outside of layers, then those of each layer.

    All are outside where layers are not 0 … block_count − 1, each with tensors.
    """
    outside: list[TensorInfo] = []
    layers: dict[int, list[TensorInfo]] = {}
    for tensor in source.tensors:
        found = _BLOCK.match(tensor.name)
        (layers.setdefault(int(found[1]), []) if found else outside).append(tensor)
    n = source.n_layers
    if not outside or n is None or sorted(layers) != list(range(n)):
        return [list(source.tensors)]
    return [outside, *(layers[i] for i in range(n))]


def _renumbered(tensor: TensorInfo, start: int) -> TensorInfo:
    found = _BLOCK.match(tensor.name)
    if not start or not found:
        return tensor
    return replace(tensor, name=f"blk.{int(found[1]) - start}.{tensor.name[found.end() :]}")


def _cut_records(source: GGUFFile, overrides: Overrides, start: int) -> list[bytes]:
    """Return the metadata of the model from a layer on."""
    if not start:
        return metadata_records(source, overrides)
    metadata, arch, n = source.metadata, source.architecture, source.n_layers or 0
    counts = {}
    for name in ("block_count", "leading_dense_block_count"):
        key = f"{arch}.{name}"
        if (value := metadata.integer(key)) is not None:
            counts[key] = Value(metadata.types[key], max(0, value - start))
    scale = f"{arch}.embedding_scale"
    if metadata.types.get(scale) == ValueType.FLOAT32:
        counts[scale] = Value(ValueType.FLOAT32, 1.0)  # the residual stream is scaled already
    records = metadata_records(source, {**overrides, **counts})
    per_layer = [
        key
        for key in metadata
        if key.startswith(f"{arch}.")
        and (values := metadata.numbers(key)) is not None
        and len(values) == n
    ]
    whole = {metadata.record(key): key for key in per_layer}
    return [
        _cut_array(record, whole[record], start) if record in whole else record
        for record in records
    ]


def _cut_array(record: bytes, key: str, start: int) -> bytes:
    """Return an array's record without its first `start` numbers."""
    at = 8 + len(key.encode()) + 8  # the key with its length, the type, the items' type
    (n,) = struct.unpack_from("<Q", record, at)
    items = record[at + 8 :]
    return record[:at] + struct.pack("<Q", n - start) + items[start * (len(items) // n) :]
