"""What a calibration has done so far, in a folder beside its output: a killed run goes on there.

The folder has a file for each pass (llama/kept.py), and goes with the end of the run. Its lock
(flock) is held meanwhile: a second run of the same output keeps nothing.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.files import try_lock
from ramgguf.llama.kept import KeptFile
from ramgguf.llama.protocol import Keep

SAVE_SECONDS = 60.0  # between two saves of the pass under way


@dataclass(frozen=True)
class Partial:
    """The folder of the passes' files; settings tell this run from others.

    Saving leaves `spare` bytes of the disk. Without is_kept no pass is saved before its end, and
    the folder is one for the time being.
    """

    folder: Path
    settings: str = ""
    spare: int = 0
    is_kept: bool = True

    def path(self, number: int) -> Path:
        """Return the file of a pass."""
        return self.folder / f"pass-{number}.kept"

    def key(self, number: int, grams: tuple[str, ...]) -> str:
        """Return what the file of a pass over these grams says of itself."""
        text = json.dumps([self.settings, number, grams])
        return hashlib.sha256(text.encode()).hexdigest()

    def keep(self, number: int, grams: tuple[str, ...]) -> Keep:
        """Return the request that keeps what the pass takes."""
        return Keep(
            path=str(self.path(number)),
            key=self.key(number, grams),
            seconds=SAVE_SECONDS,
            spare=self.spare,
        )

    def whole(self, number: int, grams: tuple[str, ...]) -> KeptFile | None:
        """Return the file of a pass that an earlier run has ended."""
        found = KeptFile.opened(self.path(number), self.key(number, grams))
        return found if found is not None and found.header.is_whole else None


@contextmanager
def partial_folder(path: Path) -> Iterator[Path | None]:
    """Yield the folder at path, locked; None where another run has it, or it cannot be made.

    It goes once the run has ended well, and where the run ended early with nothing worth keeping.
    """
    start = time.monotonic()
    fd = _locked(path)
    if fd is None:
        yield None
        return
    had = any(path.iterdir())
    try:
        yield path
    except BaseException:
        if not had and time.monotonic() - start < SAVE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
        raise
    else:
        shutil.rmtree(path, ignore_errors=True)
    finally:
        with suppress(OSError):
            path.rmdir()  # nothing was kept
        os.close(fd)


def _locked(path: Path) -> int | None:
    """Return the descriptor that holds the folder's lock, made if it is not there."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)  # the sums tell of the model
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with suppress(OSError):  # another run may just have removed it
        if try_lock(fd) and os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    os.close(fd)
    return None
