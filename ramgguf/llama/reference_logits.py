"""Logits of the original that passes are compared with: on disk, as far as memory is short.

Those of 512 tokens over a vocabulary of 151,936 take 311 MB, so they are not kept in memory of the
process's own: they are mapped from files, whose pages the kernel writes out and drops as it needs.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.core.files import free_bytes, mapped_array
from ramgguf.llama.model import Logits

_MOST_BYTES = 8 << 30
_SHARE_OF_DISK = 0.5  # of what is free


class ReferenceLogits:
    """Logits by key, in files without a name in `folder`: nothing is left of them at the end.

    They take at most 8 GiB and half of the disk that is free; the oldest make room for new ones.
    The newest are always kept, in memory where the disk has no room for them.
    """

    def __init__(self, folder: Path, *, most_bytes: int = _MOST_BYTES) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._kept: dict[bytes, Logits] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._kept

    def __getitem__(self, key: bytes) -> Logits:
        return self._kept[key]

    def clear(self) -> None:
        """Give all up."""
        self._kept.clear()

    def add(self, key: bytes, shape: Sequence[int], fill: Callable[[Logits], None]) -> Logits:
        """Return the logits of the key, (tokens, vocabulary), which fill has filled in."""
        n_bytes = np.dtype(np.float32).itemsize * int(np.prod(shape))
        while self._kept and not self._has_room(n_bytes):
            del self._kept[next(iter(self._kept))]
        logits = self._array(tuple(shape), n_bytes)
        fill(logits)
        self._kept[key] = logits
        return logits

    def _has_room(self, n_bytes: int) -> bool:
        try:
            free = free_bytes(self._folder)
        except OSError:
            return False
        kept = sum(logits.nbytes for logits in self._kept.values())
        return n_bytes <= min(self._most_bytes - kept, _SHARE_OF_DISK * free)

    def _array(self, shape: tuple[int, ...], n_bytes: int) -> Logits:
        if self._has_room(n_bytes):
            with contextlib.suppress(EngineError):
                return mapped_array(self._folder, shape, np.float32, error=EngineError)
        return np.empty(shape, np.float32)
