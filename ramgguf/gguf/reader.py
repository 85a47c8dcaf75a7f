"""GGUF files read: header, metadata, and tensor data by ranges of rows; shards open as one file.

Headers are read into memory once and never looked at again in the file. Tensor data are read with
pread: a file that is cut short while in use is an error, where a memory map would end the process
with SIGBUS, and what was read does not count as this process's memory.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.closing import Closing
from ramgguf.core.errors import GGUFError
from ramgguf.core.units import format_count
from ramgguf.gguf.architecture import PROJECTORS, has_tied_embedding, layer_of, trunk_layers
from ramgguf.gguf.fork_types import FORK
from ramgguf.gguf.header import GGML_TYPES_BY_ID, TensorInfo, ValueType
from ramgguf.gguf.shards import Shard, require_whole, shard_paths

__all__ = [
    "GGUFFile",
    "TensorInfo",
    "open_gguf",
    "open_shards",
    "require_language_model",
    "require_loadable",
]

# What else comes as GGUF, by general.type or general.architecture.
_OTHER_KINDS: Mapping[str, str] = {
    "adapter": "a LoRA adapter; quantize the model that it adapts, with this file as --lora",
    "imatrix": "an importance matrix; give it with --imatrix",
    "controlvector": "a control vector",
}
_PROJECTOR = (
    "a multimodal projector (mmproj), which `measure` and `quantize --budget` take; this needs the "
    "language model beside it"
)

# What sample_sha256 reads: of each tensor up to _MOST_SPANS spans, fewer where tensors are many.
_SPAN_BYTES, _MOST_SPANS, _ALL_SPANS = 4096, 2, 4096
_MOST_LAYERS = 1 << 16
_LONGEST_ROW = 1 << 22  # weights; those of models have tens of thousands
_MOST_NAME = 256  # characters
# Where rows may lie in memory, and how far apart tensors may be to be read at one go.
_ALIGNMENT, _MOST_PADDING = 32, 4096


@dataclass(slots=True)
class _Span:
    """Bytes of a shard from begin to end (exclusive), and where they go in a buffer."""

    shard: int
    begin: int
    end: int
    place: int

    def leads_to(self, shard: int, begin: int) -> bool:
        """Return whether what begins there can be read together with this."""
        near = shard == self.shard and 0 <= begin - self.end <= _MOST_PADDING
        return near and (begin - self.begin) % _ALIGNMENT == 0


class GGUFFile(Closing):
    """An open GGUF file, or all shards of one. Reads are safe from any number of threads."""

    def __init__(self, shards: tuple[Shard, ...]) -> None:
        self._shards = shards
        first = shards[0]
        self.paths = tuple(s.path for s in shards)
        self.n_bytes = sum(s.n_bytes for s in shards)
        self.metadata = first.metadata
        self.alignment = first.alignment
        self.version = first.version
        self.tensors = tuple(t for s in shards for t in s.tensors)
        self._by_name: dict[str, TensorInfo] = {}
        for tensor in self.tensors:
            if self._by_name.setdefault(tensor.name, tensor) is not tensor:
                path = self.paths[tensor.shard]
                raise GGUFError(f"{path}: tensor {tensor.name!r} is in another shard, too")

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files."""
        return self._shards

    def close(self) -> None:
        """Close the file; rows that were handed out stay valid."""
        for shard in self._shards:
            shard.close()

    @cached_property
    def architecture(self) -> str:
        """general.architecture; raises GGUFError if it is missing."""
        name = self.metadata.string("general.architecture")
        if name is None:
            raise GGUFError(f"{self.paths[0]}: general.architecture is missing; is this a model?")
        return name

    @property
    def is_projector(self) -> bool:
        """Whether this is an mmproj file: an encoder of images or sound, and its projector."""
        keys = ("general.type", "general.architecture")
        return any(self.metadata.string(key) in PROJECTORS for key in keys)

    @property
    def name(self) -> str | None:
        """general.name, if the file has one; of a very long one, how it begins."""
        return self.metadata.string("general.name", _MOST_NAME)

    @property
    def kv_types(self) -> Mapping[str, ValueType]:
        """The value type of every metadata key."""
        return self.metadata.types

    @property
    def n_layers(self) -> int | None:
        """The architecture's block_count, if the file has one.

        Raises GGUFError where it is more than any model has: whoever asks counts by layer.
        """
        found = self.metadata.integer(f"{self.architecture}.block_count")
        if found is not None and not 0 <= found <= _MOST_LAYERS:
            raise GGUFError(
                f"{self.paths[0]}: block_count is {found}, expected {_MOST_LAYERS} at most"
            )
        return found

    @cached_property
    def n_trunk_layers(self) -> int | None:
        """The layers that make the next token: those of draft blocks left out."""
        n_draft = self.metadata.integer(f"{self.architecture}.nextn_predict_layers") or 0
        return trunk_layers((t.name for t in self.tensors), self.n_layers, n_draft)

    @cached_property
    def draft_layers(self) -> frozenset[int]:
        """The layers that predict further tokens, after the trunk."""
        n_layers = self.n_trunk_layers
        if n_layers is None:
            return frozenset()
        layers = (layer_of(t.name) for t in self.tensors if t.name.startswith("blk."))
        return frozenset(n for n in layers if n is not None and n >= n_layers)

    @cached_property
    def has_tied_embedding(self) -> bool:
        """Whether the token embedding is the head, too."""
        return has_tied_embedding(t.name for t in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.n_weights for t in self.tensors)

    @cached_property
    def header_sha256(self) -> str:
        """SHA-256 of the header bytes of all shards, hexadecimal."""
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(memoryview(shard.head)[: shard.header_bytes])
        return digest.hexdigest()

    @cached_property
    def sample_sha256(self) -> str:
        """SHA-256 over a sample of the tensors' data, hexadecimal: tells models of one shape apart.

        The first and the last 4 KiB of every tensor; of more than 2,048 tensors, the first only.
        Changes that leave all of these alone are not seen. Raises GGUFError when the file ends
        early or cannot be read.
        """
        digest = hashlib.sha256()
        n_spans = max(1, min(_MOST_SPANS, _ALL_SPANS // max(1, len(self.tensors))))
        for tensor in self.tensors:
            buffer = bytearray(min(tensor.n_bytes, _SPAN_BYTES))
            left = tensor.n_bytes - len(buffer)
            for place in sorted({left * i // max(1, n_spans - 1) for i in range(n_spans)}):
                self._shards[tensor.shard].read(tensor.offset + place, memoryview(buffer))
                digest.update(buffer)
        return digest.hexdigest()

    def has_tensor(self, name: str) -> bool:
        """Return whether there is a tensor of that name."""
        return name in self._by_name

    def tensor(self, name: str) -> TensorInfo:
        """Return the tensor of that name; raises GGUFError if there is none."""
        try:
            return self._by_name[name]
        except KeyError:
            raise GGUFError(f"{self.paths[0]}: there is no tensor {name!r}") from None

    def read_rows(
        self, tensor: TensorInfo, start: int, stop: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Return rows start to stop, copied, of shape (stop - start, row_bytes).

        out, if given, is a contiguous buffer of at least that many bytes, which is filled and whose
        head is returned. Raises GGUFError when the file ends early or cannot be read.
        """
        n_bytes = (stop - start) * tensor.row_bytes
        buffer = np.empty(n_bytes, np.uint8) if out is None else out.reshape(-1)[:n_bytes]
        if len(buffer) < n_bytes:
            raise ValueError(f"a buffer of {len(buffer)} bytes cannot hold {n_bytes}")
        self._shards[tensor.shard].read(tensor.offset + start * tensor.row_bytes, buffer.data)
        return buffer.reshape(stop - start, tensor.row_bytes)

    def read_ranges(
        self,
        ranges: Sequence[tuple[TensorInfo, int, int]],
        take: Callable[[int], NDArray[np.uint8]],
    ) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        """Return the rows of every range (tensor, start, stop), and the bytes that were read.

        All lie in the buffer of so many bytes that take returns. Ranges that follow each other in
        the file are read at one go, with what pads them. Raises as read_rows does.
        """
        spans: list[_Span] = []
        places, size = [], 0
        for tensor, start, stop in ranges:
            begin = tensor.offset + start * tensor.row_bytes
            end = begin + (stop - start) * tensor.row_bytes
            if not spans or not spans[-1].leads_to(tensor.shard, begin):
                size += -size % _ALIGNMENT
                spans.append(_Span(tensor.shard, begin, end, size))
            spans[-1].end = end
            places.append(spans[-1].place + begin - spans[-1].begin)
            size = spans[-1].place + end - spans[-1].begin
        buffer = take(size)
        read = [buffer[s.place : s.place + s.end - s.begin] for s in spans]
        for span, data in zip(spans, read, strict=True):
            self._shards[span.shard].read(span.begin, data.data)
        rows = []
        for (tensor, start, stop), place in zip(ranges, places, strict=True):
            n_bytes = (stop - start) * tensor.row_bytes
            rows.append(buffer[place : place + n_bytes].reshape(stop - start, -1))
        return rows, read

    def require_unchanged(self) -> None:
        """Raise GGUFError if a file was written to or cut short since it was opened."""
        for shard in self._shards:
            if shard.changed():
                raise GGUFError(f"{shard.path}: the file was changed while it was being read")


def require_language_model(file: GGUFFile, *, or_projector: bool = False) -> None:
    """Raise GGUFError, by what it is, for a GGUF file that is no language model, or projector."""
    path, metadata = file.paths[0], file.metadata
    if file.is_projector and not or_projector:
        raise GGUFError(f"{path}: is {_PROJECTOR}")
    for key in ("general.type", "general.architecture"):
        value = metadata.string(key)
        if value is not None and value in _OTHER_KINDS:
            raise GGUFError(f"{path}: is {_OTHER_KINDS[value]} ({key} is {value!r})")
    if any(key.startswith("imatrix.") for key in metadata):
        raise GGUFError(f"{path}: is {_OTHER_KINDS['imatrix']}")
    if not file.tensors:
        raise GGUFError(
            f"{path}: holds a vocabulary only, no tensors: there is nothing to quantize"
        )
    _ = file.architecture


def require_loadable(file: GGUFFile) -> None:
    """Raise GGUFError for a model whose data nothing here or in llama.cpp can read.

    That is one with types of a fork of llama.cpp, or with rows longer than any model's: a row is
    the least that is read at a time.
    """
    foreign = [t for t in file.tensors if t.type_id not in GGML_TYPES_BY_ID]
    if foreign:
        names = ", ".join(sorted({t.type_name for t in foreign}))
        raise GGUFError(
            f"{file.paths[0]}: has {format_count(len(foreign), 'tensor')} ({foreign[0].name!r} "
            f"first) in types of {FORK} ({names}), which llama.cpp does not have; take the model "
            "in F16 or BF16"
        )
    for tensor in file.tensors:
        if tensor.row_length > _LONGEST_ROW:
            raise GGUFError(
                f"{file.paths[tensor.shard]}: tensor {tensor.name!r} has rows of "
                f"{tensor.row_length} weights; at most {_LONGEST_ROW} are supported"
            )


def open_gguf(path: Path, *, kind_check: bool = False, or_projector: bool = False) -> GGUFFile:
    """Return the open file; given one shard of a model, all shards as one file.

    With kind_check, files that are no language models (or projectors, if these will do) are
    refused, and those whose data cannot be read (require_loadable). Raises GGUFError for whatever
    is wrong with the file.
    """
    return open_shards(shard_paths(path), kind_check=kind_check, or_projector=or_projector)


def open_shards(
    paths: Sequence[Path], *, kind_check: bool = False, or_projector: bool = False
) -> GGUFFile:
    """Return the files, whatever their names, as one: all shards of a model in their order."""
    with contextlib.ExitStack() as opened:
        shards = tuple(
            opened.enter_context(contextlib.closing(Shard(p, number)))
            for number, p in enumerate(paths)
        )
        require_whole(shards)
        file = GGUFFile(shards)
        if kind_check:
            require_language_model(file, or_projector=or_projector)
            require_loadable(file)
        opened.pop_all()
    return file
