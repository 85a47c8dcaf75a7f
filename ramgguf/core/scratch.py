"""Folders for what a run needs only while it lives.

A scratch folder is held locked (flock) by its process. One that nobody holds locked was left by a
process that was killed: the next run that makes one beside it removes it.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ramgguf.core.errors import RamggufError

PREFIX = "ramgguf-scratch-"
_NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS)


@contextmanager
def scratch_folder(parent: Path | None, *, error: type[RamggufError]) -> Iterator[Path]:
    """Yield a new folder in parent, by default the system's for temporary files; then remove it.

    Raises `error` when it cannot be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    for orphan in parent.glob(f"{PREFIX}*"):
        _remove_if_orphaned(orphan)
    try:
        folder, lock = _make_locked(parent)
    except OSError as e:
        raise error(f"{parent}: a folder cannot be made there: {e.strerror}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _make_locked(parent: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        # Before it is locked, another process may take it for an orphan: then make another.
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            _lock(lock, wait=True)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _lock(fd: int, *, wait: bool) -> bool:
    """Return whether the folder is now ours alone, which a file system without locks cannot say."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _remove_if_orphaned(folder: Path) -> None:
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_uid == os.geteuid() and _lock(fd, wait=False):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)
