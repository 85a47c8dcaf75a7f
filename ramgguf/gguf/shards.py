"""One file of a GGUF model: its descriptor, its header, and which other files belong to it."""

import os
import re
import stat
from pathlib import Path

from ramgguf._core import Header, HeaderError, scan_header
from ramgguf.core.errors import GGUFError
from ramgguf.core.gc_paused import gc_paused
from ramgguf.core.inputs import reading
from ramgguf.gguf import other_files
from ramgguf.gguf.fork_types import FORK_TYPES
from ramgguf.gguf.header import GGML_TYPES, GGML_TYPES_BY_ID, KeySpan, Metadata, TensorInfo

_FIRST_READ = 1 << 22
_LONGEST_HEADER = 1 << 27  # many times any real model's; bounds what a damaged file costs
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_TYPE_ROWS = [
    *((t.id, t.block_weights, t.block_bytes, 0) for t in GGML_TYPES.values()),
    *((t.id, t.block_weights, t.block_bytes, t.row_bytes) for t in FORK_TYPES.values()),
]
_TYPE_NAMES = {
    **{t.id: t.name for t in FORK_TYPES.values()},
    **{t.id: t.name for t in GGML_TYPES_BY_ID.values()},
}


class Shard:
    """An open file: its descriptor, its identity when it was opened, its header.

    Raises GGUFError for whatever is wrong with the file.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path = path
        try:
            # Without O_NONBLOCK, opening a FIFO would wait for ever.
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as e:
            why = other_files.missing(path) if isinstance(e, FileNotFoundError) else None
            why = why or f"cannot be opened: {getattr(e, 'strerror', e)}"
            raise GGUFError(f"{path}: {why}") from None
        try:
            self.status = os.fstat(self.fd)
            if stat.S_ISDIR(self.status.st_mode):
                raise GGUFError(f"{path}: {other_files.folder(path)}")
            if not stat.S_ISREG(self.status.st_mode):
                raise GGUFError(f"{path}: is not a regular file")
            self.n_bytes = self.status.st_size
            self.head, header = self._read_header()
            reading(path)
        except BaseException:
            os.close(self.fd)
            raise
        self.header_bytes = header.info_end
        self.alignment = header.alignment
        self.version = header.version
        self.metadata = Metadata(self.head, map(KeySpan._make, header.keys))
        with gc_paused():
            names = {kind: _TYPE_NAMES[kind] for _, _, kind, _, _ in header.tensors}
            self.tensors = tuple(
                TensorInfo(name, shape, names[kind], kind, n_bytes, number, offset)
                for name, shape, kind, offset, n_bytes in header.tensors
            )

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with tensor data from that offset of the file on.

        Raises GGUFError when the file ends early or cannot be read.
        """
        end = offset + len(buffer)
        while offset < end:
            try:
                n = os.preadv(self.fd, [buffer[offset - end :]], offset)
            except OSError as e:
                raise GGUFError(f"{self._place(offset)}: {e.strerror}") from None
            if n == 0:
                raise GGUFError(
                    f"{self._place(offset)}: the file ends at byte {offset}; it had "
                    f"{self.n_bytes} bytes when it was opened: was it cut short meanwhile?"
                )
            offset += n

    def _place(self, offset: int) -> str:
        """Return the file's name and that of the tensor there, for messages."""
        name = max((t for t in self.tensors if t.offset <= offset), key=lambda t: t.offset).name
        return f"{self.path}: tensor {name!r}"

    def _read_header(self) -> tuple[bytes, Header]:
        """Return the file's first bytes, the whole header among them, and what they say."""
        length = at_least = _FIRST_READ
        while at_least <= _LONGEST_HEADER:
            length = min(max(length, at_least), _LONGEST_HEADER, self.n_bytes)
            data, header = self._scan(length)
            if isinstance(header, Header):
                return data, header
            del data  # before more is read
            length, at_least = 8 * length, header
        raise GGUFError(
            f"{self.path}: the header goes on beyond {_LONGEST_HEADER} bytes; is the file damaged?"
        )

    def _scan(self, length: int) -> tuple[bytes, Header | int]:
        try:
            data = os.pread(self.fd, length, 0)
            header = scan_header(data, self.n_bytes, _TYPE_ROWS)
        except OSError as e:
            raise GGUFError(f"{self.path}: cannot be read: {e.strerror}") from None
        except HeaderError as e:
            raise GGUFError(f"{self.path}: {other_files.not_gguf(data) or e}") from None
        if isinstance(header, int) and len(data) < length:
            raise GGUFError(f"{self.path}: was cut short while it was being opened")
        return data, header

    def changed(self) -> bool:
        """Return whether the file was written to or cut short since it was opened."""

        def identity(s: os.stat_result) -> tuple[int, int, int, int]:
            return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns

        return identity(os.fstat(self.fd)) != identity(self.status)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def model_stem(path: Path) -> str:
    """Return the model's name: that of its file without .gguf, in any case, and shard number; of a
    checkpoint that of its folder.
    """
    stem = re.sub(r"\.gguf$", "", path.name or path.absolute().name, flags=re.IGNORECASE)
    return re.sub(r"-\d{5}-of-\d{5}$", "", stem) or stem


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Return the paths of all shards, given that of one; of a file by itself, its own."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise GGUFError(f"{path}: shard {int(match['number'])} of {count} cannot be")
    names = (f"{match['prefix']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1))
    return tuple(path.with_name(name) for name in names)


def require_whole(shards: tuple[Shard, ...]) -> None:
    """Raise GGUFError unless the shards are all shards of one model, in their order."""
    n_tensors = sum(len(s.tensors) for s in shards)
    expectations = [
        *((shard, "split.no", number) for number, shard in enumerate(shards)),
        *((shard, "split.count", len(shards)) for shard in shards),
        *((shard, "split.tensors.count", n_tensors) for shard in shards),
    ]
    for shard, key, expected in expectations:
        # A file without split.count is the only shard.
        if len(shards) == 1 and key not in shard.metadata:
            continue
        found = shard.metadata.integer(key)
        if found != expected:
            shown = "no integer" if found is None and key in shard.metadata else found
            raise GGUFError(
                f"{shard.path}: {key} is {shown}, expected {expected}; are all shards there, "
                "under their own names, and of one model?"
            )
