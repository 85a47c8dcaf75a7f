"""What a long sweep has encoded, kept on disk: after a kill the same sweep goes on from there.

A file of records, one for each run of rows, in their order: the length of a line of JSON (8 bytes,
little-endian), the line, and the blocks. The first record names the sweep and has no blocks. What
a kill has cut short, and what follows blocks whose checksum is wrong, is written anew.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field, ValidationError

from ramgguf.core.closing import Closing
from ramgguf.core.documents import FrozenModel, NonNegative, Number
from ramgguf.core.files import try_lock
from ramgguf.quants.codec import Rows

_LENGTH_BYTES = 8
_MOST_LINE_BYTES = 1 << 24

Squares = tuple[tuple[NonNegative, Number, Number], ...]


class KeptRun(FrozenModel):
    """A record: the sweep's key, or by tensor Σ(x−q)² and Σx² of a run, and its blocks' bytes."""

    key: str | None = None
    squares: Squares = ()
    sizes: tuple[NonNegative, ...] = ()
    checksum: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class KeptBlocks(Closing):
    """The file at path for the sweep of this key. Use as a context manager.

    A file of another sweep is begun anew. Where it cannot be written, or another process has it,
    nothing is kept: that saves time after a kill, and is no reason to end a sweep.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._file: BinaryIO | None = None
        with suppress(OSError):
            path.touch(mode=0o600)
            self._file = path.open("r+b")
            if not try_lock(self._file.fileno()):
                self._file.close()
                self._file = None
        self._key = key

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a full disk
                file.close()

    @property
    def is_kept(self) -> bool:
        """Whether the file can be written."""
        return self._file is not None

    def begun(self) -> Iterator[tuple[KeptRun, list[memoryview]]]:
        """Yield the runs that were kept, with the blocks of each tensor; then add appends to them.

        It must be read to its end before anything is added.
        """
        file = self._file
        if file is None:
            return
        file.seek(0)
        first = _line(file)
        if first is None or first.key != self._key:
            self._cut(0)
            self._append(KeptRun(key=self._key), ())
            return
        end = file.tell()
        while (record := _line(file)) is not None:
            data = memoryview(file.read(sum(record.sizes)))
            if len(data) != sum(record.sizes) or zlib.crc32(data) != record.checksum:
                break
            end = file.tell()
            ends = [sum(record.sizes[: i + 1]) for i in range(len(record.sizes))]
            yield record, [data[b - n : b] for b, n in zip(ends, record.sizes, strict=True)]
            file.seek(end)
        self._cut(end)

    def add(self, squares: Squares, blocks: Sequence[Rows]) -> None:
        """Keep the next run."""
        checksum = 0
        for data in blocks:
            checksum = zlib.crc32(data.data, checksum)
        sizes = tuple(data.nbytes for data in blocks)
        self._append(KeptRun(squares=squares, sizes=sizes, checksum=checksum), blocks)

    def _append(self, record: KeptRun, blocks: Sequence[Rows]) -> None:
        if self._file is None:
            return
        line = record.model_dump_json(exclude_defaults=True).encode()
        try:
            self._file.write(len(line).to_bytes(_LENGTH_BYTES, "little") + line)
            for data in blocks:
                self._file.write(data.data)
            self._file.flush()
        except OSError:
            with suppress(OSError):  # the disk is full: the output needs the room
                os.ftruncate(self._file.fileno(), 0)
            self.close()

    def _cut(self, at: int) -> None:
        if self._file is not None:
            try:
                self._file.seek(at)
                os.ftruncate(self._file.fileno(), at)
            except OSError:
                self.close()


def _line(file: BinaryIO) -> KeptRun | None:
    """Return the next record; None at the end, or where a kill cut it short."""
    n = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 0 < n <= _MOST_LINE_BYTES:
        return None
    try:
        return KeptRun.model_validate_json(file.read(n))
    except ValidationError:
        return None
