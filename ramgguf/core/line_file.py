"""A file of lines that grows during a run; a killed run continues from it."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import RamggufError
from ramgguf.core.escape import json_text
from ramgguf.core.files import refuse_input
from ramgguf.core.inputs import reading


def whole_lines(data: bytes) -> list[bytes]:
    """Return the lines of data, without the last one if a kill cut it short."""
    return data.split(b"\n")[:-1]


class LineFile:
    """The file at path, made if it is not there, locked so that one process alone adds lines.

    lines are those that it holds; one that was cut short is overwritten by the first that is added,
    and until then nothing of the file is touched. Raises `error` when it cannot be opened or
    written, is full, or is in use by another process.
    """

    def __init__(self, path: Path, *, error: type[RamggufError]) -> None:
        self.path = path
        self._error = error
        self._fd, self._is_ours = -1, False
        refuse_input(path, error=error)
        try:
            self._open()
            data = path.read_bytes()
            reading(path)  # no other output of the run may replace it
        except OSError as e:
            self.close()
            raise error(f"{path}: {e.strerror}") from None
        except BaseException:
            self.close()
            raise
        self.lines = whole_lines(data)
        self._end = data.rfind(b"\n") + 1
        if data[self._end : self._end + 1] not in (b"", b"{"):  # no line of ours, cut short or not
            self.close()
            raise error(f"{path}: ends in what is no line of JSON; name another file")

    @classmethod
    def resumed(cls, path: Path, *, resume: bool, error: type[RamggufError]) -> Self:
        """Return the file; raises `error` where it is there already and resume is False."""
        if path.exists() and not resume:
            raise error(f"{path}: exists; add --resume to go on with it, or remove it")
        return cls(path, error=error)

    def append(self, line: bytes) -> None:
        """Add a line, whole or not at all."""
        view = memoryview(line + b"\n")
        n_bytes = len(view)
        try:
            os.ftruncate(self._fd, self._end)
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as e:
            with suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise self._error(f"{self.path}: cannot be written: {e.strerror}") from None
        self._end += n_bytes

    def append_record(self, record: FrozenModel) -> None:
        """Add a record as a line of JSON, whole or not at all."""
        self.append(json_text(record.model_dump_json()).encode())

    def clear(self) -> None:
        """Take all lines away."""
        try:
            os.ftruncate(self._fd, 0)
        except OSError as e:
            raise self._error(f"{self.path}: cannot be written: {e.strerror}") from None
        self.lines, self._end = [], 0

    def close(self) -> None:
        """Close the file, which frees it for others; one that it made and left empty is removed."""
        if self._fd >= 0:
            if self._is_ours and os.fstat(self._fd).st_size == 0:
                with suppress(OSError):
                    self.path.unlink()
            os.close(self._fd)
            self._fd, self._is_ours = -1, False

    def _open(self) -> None:
        """Open and lock the file, again where another process removed it before it was locked."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC
        while True:
            try:
                self._fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                is_new = True
            except FileExistsError:
                self._fd = os.open(self.path, flags | os.O_CREAT, 0o666)
                is_new = False
            self._lock()
            try:
                if os.path.samestat(os.fstat(self._fd), self.path.stat()):
                    self._is_ours = is_new
                    return
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error(f"{self.path}: another process is writing it") from None
        except OSError:
            return  # a file system without locks: nothing to protect it with
