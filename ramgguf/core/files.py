"""Files that appear under their names whole or not at all, however their writer ends.

A file is written to `.NAME.ramgguf-tmp` beside its target, which its writer holds locked (flock),
flushed to disk and renamed. A temporary that nobody holds locked is an orphan of a process that was
killed: the next writer in that folder removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ramgguf.core import inputs
from ramgguf.core.errors import RamggufError
from ramgguf.core.units import format_bytes

_SUFFIX = ".ramgguf-tmp"
_MOST_VIEWS = 1024  # that the system writes at one go (IOV_MAX)
_PATIENCE_SECONDS = 0.5  # another process may hold the lock for the moment that removing takes


def temporary_path(path: Path) -> Path:
    """Return the name under which path is written until it is complete."""
    return path.with_name(f".{path.name}{_SUFFIX}")


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def try_lock(fd: int) -> bool:
    """Return whether the descriptor's file is now locked, or no file system's lock protects it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise
        # This file system has no locks: nothing to protect the temporary with.
    return True


def _remove_if_orphaned(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) and try_lock(fd) and _same_file(fd, path):
                path.unlink()
        finally:
            os.close(fd)


def remove_orphans(folder: Path) -> None:
    """Remove the temporaries that killed processes left in the folder."""
    for path in folder.glob(f".*{_SUFFIX}"):
        _remove_if_orphaned(path)


def _create_locked(path: Path) -> int:
    """Return a descriptor of the new, empty and locked file at path.

    What an earlier process left there is removed, never written to: it may be a second name of a
    finished output.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    while True:
        fd = -1
        try:
            fd = os.open(path, flags, 0o666)
            # Before it was locked, another process may have taken the file for an orphan.
            if try_lock(fd) and _same_file(fd, path):
                return fd
        except FileExistsError:
            pass
        except BaseException:  # Ctrl-C
            if fd >= 0:
                path.unlink(missing_ok=True)
            else:  # it may have come before the descriptor had its name
                _remove_if_orphaned(path)
            raise
        if fd >= 0:
            os.close(fd)
        kind = _other_kind(path)
        if kind is not None:
            raise FileExistsError(errno.EEXIST, f"{path} is {kind}; remove it")
        _remove_if_orphaned(path)
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, "another process is writing it")
        time.sleep(0.01)


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _other_kind(path: Path) -> str | None:
    """Return what is at path if it is no regular file; None if it is one, or nothing is there."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def sync_folder(folder: Path) -> None:
    """Flush the folder's entries to disk, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _named(path: Path, error: type[RamggufError]) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error(f"{path}: the disk is full; free some space or write elsewhere") from None
        raise error(f"{path}: cannot be written: {e.strerror or e}") from None


class AtomicFile:
    """A new file of n_bytes bytes, all zero as yet; it gets its name with commit.

    It has the mode of the file that it replaces; a new one is readable by nobody who cannot read
    the run's inputs. A link to a file is followed: the file is replaced, and the link stays.

    Raises `error` when it cannot be written: the folder is missing, read-only or full, path is an
    input of the run or no regular file, it exists and force is not given, or another process is
    writing it.
    """

    def __init__(self, path: Path, n_bytes: int, *, force: bool, error: type[RamggufError]) -> None:
        refuse_existing(path, force=force, error=error)
        self.path = path = path.resolve() if path.is_symlink() else path
        self.n_bytes = n_bytes
        self._force = force
        self._error = error
        self.temporary = temporary_path(path)
        self._fd = -1
        try:
            with _named(path, error):
                self._fd = _create_locked(self.temporary)
                os.fchmod(self._fd, _mode(path))
                _reserve(self._fd, n_bytes)
        except BaseException:
            self.abort()
            raise

    def write_at(self, offset: int, *data: bytes | memoryview) -> None:
        """Write data, one after the other, from that offset on; safe from any number of threads."""
        views = [memoryview(d).cast("B") for d in data]
        n_bytes = sum(map(len, views))
        if offset < 0 or offset + n_bytes > self.n_bytes:
            raise ValueError(f"{n_bytes} bytes at {offset} are outside of {self.n_bytes}")
        with _named(self.path, self._error):
            while views:
                n = os.pwritev(self._fd, views[:_MOST_VIEWS], offset)
                offset += n
                while views and n >= len(views[0]):
                    n -= len(views.pop(0))
                if n:
                    views[0] = views[0][n:]

    def flush(self) -> None:
        """Wait until everything that was written is on disk."""
        with _named(self.path, self._error):
            os.fsync(self._fd)

    def remove_older(self) -> None:
        """Remove what has the file's name, if it may be replaced."""
        if self._force:
            with _named(self.path, self._error):
                self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    def commit(self) -> None:
        """Flush the file and give it its name; raises `error` if that exists and may not."""
        self.flush()
        with _named(self.path, self._error):
            _give_name(self.temporary, self.path, force=self._force, error=self._error)
        os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        # Ctrl-C may come before whoever made this has entered its `with`.
        if hasattr(self, "_fd"):
            self.abort()

    def abort(self) -> None:
        """Remove what was written; does nothing after commit."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self.temporary.unlink()
            os.close(self._fd)
            self._fd = -1


def _give_name(made: Path, path: Path, *, force: bool, error: type[RamggufError]) -> None:
    """Give a whole file its name; without force, `error` if something has come to have it."""
    if force:
        made.replace(path)
    else:
        try:  # unlike a rename, a link never replaces what came into being meanwhile
            os.link(made, path)
        except FileExistsError:
            refuse_existing(path, force=False, error=error)
            raise
        except OSError:  # a file system without links
            refuse_existing(path, force=False, error=error)
            made.replace(path)
        else:
            made.unlink()
    inputs.written(path)
    sync_folder(path.parent)


def put_in_place(made: Path, path: Path, *, force: bool, error: type[RamggufError]) -> None:
    """Give a whole file of the same file system its name, as AtomicFile does with its own: of the
    mode of what it replaces, behind a link to a file.

    Raises `error`, nothing changed, where the path may not be written.
    """
    refuse_existing(path, force=force, error=error)
    target = path.resolve() if path.is_symlink() else path
    with _named(path, error):
        made.chmod(_mode(target))
        _give_name(made, target, force=force, error=error)


def mapped_array(
    folder: Path, shape: tuple[int, ...], dtype: DTypeLike, *, error: type[RamggufError]
) -> NDArray[Any]:
    """Return an array of zeros in a file of its own in the folder, which has no name.

    It is freed with the array. Raises `error` where the file system has no room for it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), np.dtype(dtype).itemsize * math.prod(shape))
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as e:
        raise error(f"{folder}: no array can be kept there: {e.strerror}") from None


def _reserve(fd: int, n_bytes: int) -> None:
    """Set the file's length and have its blocks reserved, where the file system can."""
    if n_bytes == 0:
        return
    os.ftruncate(fd, n_bytes)
    try:
        _fallocate(fd, n_bytes)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _fallocate(fd: int, n_bytes: int) -> None:
    """Call fallocate(2), which reserves blocks or says at once that it cannot.

    posix_fallocate would then write the whole file, a byte in every block (glibc's emulation).
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    size = ctypes.c_int64
    while function(ctypes.c_int(fd), ctypes.c_int(0), size(0), size(n_bytes)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return inputs.mode_of_new()


def refuse_existing(path: Path, *, force: bool, error: type[RamggufError]) -> None:
    """Raise `error` if there is something at path that may not be replaced.

    An input of the run never is, nor what is no regular file or a link to one, forced or not.
    """
    if str(path) == "-":
        raise error("-: an output is a file; name one")
    if path.is_dir():
        raise error(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise error(f"{path}: there is no folder {path.parent}")
    refuse_input(path, error=error)
    target = path.resolve() if path.is_symlink() else path
    kind = _other_kind(target)
    if kind is not None or (path.is_symlink() and not target.exists()):
        raise error(f"{path}: is {kind or 'a link to nothing'}; an output is a regular file")
    if not force and os.path.lexists(path):
        raise error(f"{path}: exists; use --force to replace it")


def require_distinct(*outputs: Path | None, error: type[RamggufError]) -> None:
    """Raise `error` if two outputs of a run, None aside, are one file: the later would replace the
    earlier.
    """
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        target = path.resolve()
        if target in seen:
            raise error(f"{path}: is named for two outputs; name a file for each")
        seen.add(target)


def refuse_input(path: Path, *, error: type[RamggufError]) -> None:
    """Raise `error` if the run reads the file at path, under this or any other name."""
    read = inputs.input_at(path)
    if read is not None:
        raise error(f"{path}: is an input of this command ({read}); write elsewhere")


def free_bytes(folder: Path) -> int:
    """Return the room on the folder's file system."""
    return shutil.disk_usage(folder).free


def require_disk_space(folder: Path, n_bytes: int, *, error: type[RamggufError]) -> None:
    """Raise `error` if the folder's file system has less room than that, or there is no folder."""
    try:
        free = free_bytes(folder)
    except OSError as e:
        raise error(f"{folder}: {e.strerror}") from None
    if free < n_bytes:
        raise error(
            f"{folder}: has {format_bytes(free)} free and the output needs "
            f"{format_bytes(n_bytes)}; free some space or write elsewhere"
        )


def write_atomically(path: Path, data: bytes, *, error: type[RamggufError]) -> None:
    """Write a small file, whole or not at all, replacing what was there."""
    remove_orphans(path.parent)
    file = AtomicFile(path, len(data), force=True, error=error)
    try:
        file.write_at(0, data)
        file.commit()
    finally:
        file.abort()
