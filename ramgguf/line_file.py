"""A file of lines that grows while a run goes on, and from which a run that was killed goes on."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from ramgguf.errors import RamggufError


class LineFile:
    """The file at path, made if it is not there, locked so that one process alone adds lines.

    data is what it holds. Raises `error` when it cannot be opened or written, is full, or is in use
    by another process.
    """

    def __init__(self, path: Path, *, error: type[RamggufError]) -> None:
        self.path = path
        self._error = error
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._lock()
            self.data = path.read_bytes()
        except OSError as e:
            self.close()
            raise error(f"{path}: {e.strerror}") from None
        except BaseException:
            self.close()
            raise

    def keep(self, n_bytes: int) -> None:
        """Drop what follows the first n_bytes bytes: the line that a kill cut short."""
        os.ftruncate(self._fd, n_bytes)

    def append(self, line: bytes) -> None:
        """Add a line, whole or not at all."""
        start = os.fstat(self._fd).st_size
        view = memoryview(line + b"\n")
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self._fd, start)
            raise self._error(f"{self.path}: cannot be written: {e.strerror}") from None

    def close(self) -> None:
        """Close the file, which frees it for others."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error(f"{self.path}: another process is writing it") from None
        except OSError:
            return  # a file system without locks: nothing to protect it with
