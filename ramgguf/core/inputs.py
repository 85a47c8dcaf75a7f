"""Which files a run reads, so that none of its outputs replaces one of them.

A run is what `protected` surrounds: a command, or a call of the Python interface that writes files.
Whoever opens an input says so with `reading`; core.files asks before it opens an output.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ramgguf.core.errors import RamggufError

FileKey = tuple[int, int]  # device and inode


@dataclass(eq=False)
class _Run:
    inputs: dict[FileKey, Path] = field(default_factory=dict)
    written: set[FileKey] = field(default_factory=set)
    modes: int = 0o777


_runs: list[_Run] = []


@contextlib.contextmanager
def protected() -> Iterator[None]:
    """Protect every input that is opened from here on until the end."""
    run = _Run()
    _runs.append(run)
    try:
        yield
    finally:
        _runs.remove(run)


def reading(path: Path) -> None:
    """Note that the file at path is read; nothing if it is not there, or was written by the run."""
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        key = found.st_dev, found.st_ino
        for run in _runs:
            if key not in run.written:
                run.inputs[key] = path
                run.modes &= stat.S_IMODE(found.st_mode) | stat.S_IRUSR | stat.S_IWUSR


def written(path: Path) -> None:
    """Note that the run wrote this file: it may read it, and write it anew."""
    with contextlib.suppress(OSError):
        found = path.stat()
        key = found.st_dev, found.st_ino
        for run in _runs:
            run.written.add(key)
            run.inputs.pop(key, None)  # it was read to verify it


def input_at(path: Path) -> Path | None:
    """Return under which name the file at path is read by a run; None if it is not."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    key = found.st_dev, found.st_ino
    return next((run.inputs[key] for run in _runs if key in run.inputs), None)


def mode_of_new() -> int:
    """Return the mode of a new output: no input is opened to more people than it was."""
    umask = os.umask(0)
    os.umask(umask)
    mode = 0o666 & ~umask
    for run in _runs:
        mode &= run.modes
    return mode


MOST_DOCUMENT_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20


def read_bytes(path: Path, *, error: type[RamggufError], most: int = MOST_DOCUMENT_BYTES) -> bytes:
    """Return what a file holds: a regular one, or a pipe, of at most so many bytes."""
    try:
        with path.open("rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
                raise error(f"{path}: is a device; name a file")
            data = _read(file, most + 1)
    except (OSError, ValueError) as e:
        raise error(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if len(data) > most:
        raise error(f"{path}: has more than {most} bytes, too many for a document")
    reading(path)
    return data


def _read(file: BinaryIO, most: int) -> bytes:
    """Return at most so many bytes; memory is taken for what is there, not for what might be."""
    data = bytearray()
    while piece := file.read(min(_PIECE_BYTES, most - len(data))):
        data += piece
    return bytes(data)


def read_text(path: Path, *, error: type[RamggufError]) -> str:
    """Return the UTF-8 text of a file, without a byte order mark."""
    data = read_bytes(path, error=error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(f"{path}: byte {e.start} is not UTF-8; expected a text file") from None
