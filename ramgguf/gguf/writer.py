"""GGUF files written: an output that takes bytes in any order and appears whole or not at all."""

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import (
    AtomicFile,
    refuse_existing,
    remove_orphans,
    require_disk_space,
)
from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_count
from ramgguf.gguf.layout import Layout
from ramgguf.gguf.reader import GGUFFile, open_shards

_MOST_PADDING = 4096  # that is written, to join two tensors; longer gaps are zero as they are
Bytes = bytes | bytearray | memoryview | NDArray[Any]


def _view(data: Bytes) -> memoryview:
    return memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")


class GGUFOutput:
    """The files of a layout while they are being written; a context manager.

    write_at may be called from any number of threads. Leaving the context without commit, or by an
    exception, removes what was written. Raises GGUFError when the output exists and force is not
    given, is the source itself, or does not fit the disk.
    """

    def __init__(self, layout: Layout, source: GGUFFile, *, force: bool) -> None:
        self.layout = layout
        self._source = source
        self._lock = threading.Lock()
        self._missing = {t.name: t.n_bytes for t in layout.tensors.values()}
        self._files: list[AtomicFile] = []
        for shard in layout.shards:
            for path in source.paths:
                if shard.path.exists() and shard.path.samefile(path):
                    raise GGUFError(f"{shard.path}: is the source; name another output")
            refuse_existing(shard.path, force=force, error=GGUFError)
        folder = layout.shards[0].path.parent
        remove_orphans(folder)
        require_disk_space(folder, layout.n_bytes, error=GGUFError)
        try:
            for shard in layout.shards:
                file = AtomicFile(shard.path, shard.n_bytes, force=force, error=GGUFError)
                self._files.append(file)
                file.write_at(0, shard.header)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.abort()

    def write_at(self, name: str, offset: int, data: Bytes) -> None:
        """Write bytes of a tensor's data, offset bytes from its start; each byte just once."""
        self.write_pieces([(name, offset, data)])

    def write_pieces(self, pieces: Iterable[tuple[str, int, Bytes]]) -> None:
        """Write bytes of tensors: name, offset and data of each, as write_at does.

        Tensors that follow each other in the file are written at one go.
        """
        written: list[tuple[str, int]] = []
        views: list[memoryview] = []
        shard, begin, end = 0, 0, 0
        for name, offset, data in pieces:
            tensor, view = self.layout.tensors[name], _view(data)
            if offset < 0 or offset + len(view) > tensor.n_bytes:
                raise GGUFError(
                    f"tensor {name!r}: bytes {offset} to {offset + len(view)} are not within its "
                    f"{tensor.n_bytes} in {tensor.type_name}"
                )
            at = tensor.offset + offset
            gap = at - end
            padding = -end % self._source.alignment
            if views and tensor.shard == shard and gap in (0, min(padding, _MOST_PADDING)):
                views.append(memoryview(bytes(gap)))
            else:
                self._write(shard, begin, views)
                shard, begin, views = tensor.shard, at, []
            views.append(view)
            end = at + len(view)
            written.append((name, len(view)))
        self._write(shard, begin, views)
        with self._lock:
            for name, n_bytes in written:
                self._missing[name] -= n_bytes

    def _write(self, shard: int, offset: int, views: Sequence[memoryview]) -> None:
        if views:
            self._files[shard].write_at(offset, *views)

    def written(self) -> GGUFFile:
        """Return what was written so far, open, as the file that it will be."""
        return open_shards([file.temporary for file in self._files])

    def flush(self) -> None:
        """Wait until everything that was written is on disk."""
        for file in self._files:
            file.flush()

    def commit(self) -> tuple[Path, ...]:
        """Flush the files, give them their names and return these.

        The first shard, which loaders open, is named last, and an older one goes first: whenever
        this ends midway, there is no first shard that old and new ones could follow. Raises
        GGUFError if a tensor was not written in full or the source has changed since it was opened.
        """
        for name, missing in self._missing.items():
            if missing:
                raise GGUFError(f"tensor {name!r}: lacks {format_count(missing, 'byte')}")
        self._source.require_unchanged()
        self.flush()
        if len(self._files) > 1:
            self._files[0].remove_older()
        for file in reversed(self._files):
            file.commit()
        return tuple(s.path for s in self.layout.shards)

    def abort(self) -> None:
        """Remove what was written; does nothing to files that have their names."""
        for file in self._files:
            file.abort()


def rewrite(
    layout: Layout,
    source: GGUFFile,
    convert: Callable[[Chunk, NDArray[np.uint8]], NDArray[np.uint8]],
    *,
    stage: str,
    force: bool = False,
    threads: int,
    progress: Progress,
) -> Path:
    """Write the source's tensors as convert makes them, and return the path of the (first) file.

    convert gets a chunk and its rows, uint8 (rows, bytes), and returns them in the layout's type;
    threads call it. stage names the work in the progress. Raises GGUFError as GGUFOutput does.
    """

    def write(chunk: Chunk) -> int:
        tensor = source.tensors[chunk.index]
        rows = source.read_rows(tensor, chunk.start, chunk.stop)
        data = convert(chunk, rows)
        output.write_at(tensor.name, chunk.start * data.shape[1], data)
        return rows.nbytes

    with GGUFOutput(layout, source, force=force) as output:
        progress.start(stage, sum(t.n_bytes for t in source.tensors), "bytes")
        try:
            for n_bytes in map_chunks(write, runs(source.tensors), threads):
                progress.advance(n_bytes)
        finally:
            progress.finish()
        return output.commit()[0]
