"""What a pass of calibration has taken, kept on disk: after a kill the pass goes on from there.

One file holds Σx², XᵀX and the rows that wait to be added to it, the tokens drawn so far, and
llama.cpp's own state of the sequences that are being drawn. All of it comes back to the bit, so
that a pass that went on ends with the sums of one that was never killed.

The file: the length of the header (8 bytes, little-endian), the header in JSON, the arrays in the
header's order, the states of the sequences.
"""

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from ramgguf.core.documents import FrozenModel, NonNegative
from ramgguf.core.errors import EngineError
from ramgguf.core.files import AtomicFile, free_bytes, remove_orphans
from ramgguf.core.units import format_bytes
from ramgguf.llama.capture import Sums, Taken, Tap, TapState
from ramgguf.llama.protocol import TokenIds, pack_ids, unpack_ids
from ramgguf.llama.sampling import Begun, Steps

SAVING_SHARE = 0.05  # of a pass's time that saving may take
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 1 << 30

_Kind = Literal["squares", "counts", "gram", "rows", "tokens"]


class KeptArray(FrozenModel):
    """An array of the file: what it is, and of which weight."""

    kind: _Kind
    name: str
    dtype: str
    shape: tuple[NonNegative, ...]

    @property
    def n_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


class KeptDrawing(FrozenModel):
    """Sequences that are being drawn: how many at a time, the batches that are complete, and how
    many steps of the next one are done. states are the sizes of its sequences' states.
    """

    together: NonNegative
    batches: tuple[tuple[str, ...], ...]
    n_done: NonNegative
    states: tuple[NonNegative, ...]

    @property
    def n_tokens(self) -> int:
        """The tokens that need not be drawn again."""
        complete = sum(len(unpack_ids(ids)) for batch in self.batches for ids in batch)
        return complete + self.n_done * len(self.states)


class KeptHeader(FrozenModel):
    """What the pass has done: events (sequences read, draws completed), and the draws' tokens.

    key tells runs apart; a whole pass needs no more events.
    """

    key: str
    is_whole: bool
    n_events: NonNegative = 0
    draws: tuple[tuple[str, ...], ...] = ()
    drawing: KeptDrawing | None = None
    owners: dict[str, str] = Field(default_factory=dict)
    head_input: str | None = None
    arrays: tuple[KeptArray, ...] = ()


@dataclass(frozen=True)
class KeptFile:
    """A file that holds what a pass has taken."""

    path: Path
    header: KeptHeader
    start: int  # of the arrays

    @staticmethod
    def opened(path: Path, key: str) -> "KeptFile | None":
        """Return the file of that key; None where there is none, or one of something else."""
        try:
            with path.open("rb") as file:
                n = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                if n > _MOST_HEADER_BYTES:
                    return None
                header = KeptHeader.model_validate_json(file.read(n))
            found = KeptFile(path, header, _LENGTH_BYTES + n)
            return found if header.key == key and path.stat().st_size == found.n_bytes else None
        except (OSError, ValidationError):
            return None

    @property
    def n_bytes(self) -> int:
        states = self.header.drawing.states if self.header.drawing else ()
        return self._states_start + sum(states)

    @property
    def _states_start(self) -> int:
        return self.start + sum(array.n_bytes for array in self.header.arrays)

    def arrays(self, kind: _Kind) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield names and arrays of a kind, mapped from the file, in their order."""
        at = self.start
        for array in self.header.arrays:
            if array.kind == kind:
                shape, dtype = array.shape, np.dtype(array.dtype)
                whole = np.empty(shape, dtype)  # what has no bytes cannot be mapped
                if array.n_bytes:
                    whole = np.memmap(self.path, dtype, "r", at, shape)
                yield array.name, whole
            at += array.n_bytes

    def sums(self) -> dict[str, Sums]:
        """Return Σx² of each weight that had inputs."""
        counts = dict(self.arrays("counts"))
        return {n: Sums(np.array(x), np.array(counts[n])) for n, x in self.arrays("squares")}

    def tap_state(self) -> TapState:
        """Return what a tap goes on from."""
        grams = {name: np.array(gram) for name, gram in self.arrays("gram")}
        taken = Taken(self.sums(), grams, dict(self.header.owners))
        head_input = self.header.head_input
        return TapState(
            taken,
            {name: np.array(rows) for name, rows in self.arrays("rows")},
            None if head_input is None else head_input.encode("latin-1"),
        )

    def begun(self) -> Begun | None:
        """Return the steps of the batch that was being drawn, if some were done."""
        drawing = self.header.drawing
        if drawing is None or not drawing.states:
            return None
        (tokens,) = (np.array(x) for _, x in self.arrays("tokens"))
        return Begun(drawing.n_done, tokens, self._states(drawing.states))

    def _states(self, sizes: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        at = self._states_start
        for size in sizes:
            yield np.fromfile(self.path, np.uint8, size, offset=at)
            at += size


class Keeper:
    """Keeps what a pass has taken in a file, every so many seconds (less often if saving is slow).

    A save is left out where it would leave less than `spare` bytes of the disk, or fails: it saves
    time after a kill, and is no reason to end a run. It has the drawing of an earlier run, and
    gets that of this one (tokens.KeptDraw).
    """

    def __init__(self, path: Path, key: str, tap: Tap, *, seconds: float, spare: int) -> None:
        self._path, self._key, self._tap = path, key, tap
        self._seconds, self._spare = seconds, spare
        self._n_events = 0
        self._draws: list[tuple[str, ...]] = []
        self._batches: list[tuple[str, ...]] = []  # of the draw under way
        self._n_taken = 0  # of these, what an earlier run had
        self._restored: KeptFile | None = None
        self._together = 0
        self._ended, self._took = time.perf_counter(), 0.0  # the last save

    def restore(self) -> KeptHeader | None:
        """Give the tap what an earlier run has taken, and return what that has done."""
        found = KeptFile.opened(self._path, self._key)
        if found is None:
            return None
        self._tap.restore(found.tap_state())
        header = found.header
        self._n_events, self._draws = header.n_events, list(header.draws)
        if header.drawing is not None:
            self._restored, self._batches = found, list(header.drawing.batches)
        return header

    def together(self, most: int) -> int:
        """Return how many are drawn at a time: as many as before the kill, or at most `most`."""
        drawing = self._restored.header.drawing if self._restored else None
        self._together = drawing.together if drawing else most
        return self._together

    def batch(self) -> list[TokenIds] | None:
        """Return the next batch if it was complete before the kill."""
        if self._n_taken == len(self._batches):
            return None
        self._n_taken += 1
        return [unpack_ids(ids) for ids in self._batches[self._n_taken - 1]]

    def begun(self) -> Begun | None:
        """Return the steps of the next batch that were done before the kill."""
        found, self._restored = self._restored, None
        return found.begun() if found else None

    def step(self, steps: Steps) -> None:
        """Save, if it is time, while sequences are being drawn."""
        if self._is_due():
            self._save(self._drawing(steps), steps)

    def add_batch(self, number: int, batch: Sequence[TokenIds]) -> None:
        """Record the draw's batch of that number, which is complete."""
        if number < len(self._batches):
            return  # an earlier run has drawn it
        self._batches.append(tuple(pack_ids(ids) for ids in batch))
        self._n_taken = len(self._batches)
        if self._is_due():
            self._save(self._drawing(None))

    def add_draw(self) -> None:
        """Record that the draw is complete."""
        self._draws.append(tuple(ids for batch in self._batches for ids in batch))
        self._batches, self._n_taken, self._restored = [], 0, None
        self._n_events += 1

    def add_read(self) -> None:
        """Record a sequence that was read."""
        self._n_events += 1
        if self._is_due():
            self._save(None)

    @property
    def draws(self) -> tuple[tuple[str, ...], ...]:
        """The sequences of each draw that is complete."""
        return tuple(self._draws)

    def _is_due(self) -> bool:
        waited = time.perf_counter() - self._ended
        return waited >= max(self._seconds, self._took / SAVING_SHARE)

    def _drawing(self, steps: Steps | None) -> KeptDrawing:
        return KeptDrawing(
            together=self._together,
            batches=tuple(self._batches),
            n_done=steps.n_done if steps else 0,
            states=_States.of(steps).sizes,
        )

    def _save(self, drawing: KeptDrawing | None, steps: Steps | None = None) -> None:
        start = time.perf_counter()
        header = KeptHeader(
            key=self._key,
            is_whole=False,
            n_events=self._n_events,
            draws=self.draws,
            drawing=drawing,
        )
        try:
            write_kept(self._path, self._tap.state(), header, steps, spare=self._spare)
        except EngineError:
            self._seconds = math.inf
        self._ended = time.perf_counter()
        self._took = self._ended - start


@dataclass(frozen=True)
class _States:
    """llama.cpp's states of the sequences in a context."""

    llama: Any = None
    context: Any = None
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, steps: Steps | None) -> "_States":
        if steps is None:
            return cls()
        sizes = (
            steps.llama.llama_state_seq_get_size(steps.context, i) for i in range(len(steps.drawn))
        )
        return cls(steps.llama, steps.context, tuple(sizes))

    def __iter__(self) -> Iterator[memoryview]:
        for number, size in enumerate(self.sizes):
            state = np.empty(size, np.uint8)
            pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            if self.llama.llama_state_seq_get_data(self.context, pointer, size, number) != size:
                raise EngineError("llama.cpp gives no state of a sequence")
            yield state.data


def write_kept(
    path: Path,
    state: TapState,
    header: KeptHeader,
    steps: Steps | None = None,
    *,
    spare: int = 0,
) -> None:
    """Write what a pass has taken, replacing what was there once it is on disk.

    The header gets what the state says. Raises EngineError where the file cannot be written, or
    would leave less than `spare` bytes of the disk.
    """
    arrays: list[tuple[_Kind, str, NDArray[Any]]] = []
    for name, sums in state.taken.sums.items():
        arrays += [("squares", name, sums.squares), ("counts", name, sums.counts)]
    arrays += [("gram", name, gram) for name, gram in state.taken.grams.items()]
    arrays += [("rows", name, rows) for name, rows in state.rows.items()]
    if steps is not None:
        arrays.append(("tokens", "", np.ascontiguousarray(steps.drawn[:, : steps.n_done])))
    found = [
        KeptArray(kind=kind, name=name, dtype=array.dtype.str, shape=array.shape)
        for kind, name, array in arrays
    ]
    update = {
        "owners": dict(state.taken.owners),
        "head_input": None if state.head_input is None else state.head_input.decode("latin-1"),
        "arrays": tuple(found),
    }
    text = header.model_copy(update=update).model_dump_json().encode()
    head = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    states = _States.of(steps)
    n_bytes = len(head) + sum(array.n_bytes for array in found) + sum(states.sizes)
    try:
        remove_orphans(path.parent)
        free = free_bytes(path.parent)
    except OSError as e:
        raise EngineError(f"{path}: cannot be written: {e.strerror or e}") from None
    if free < n_bytes + spare:
        raise EngineError(f"{path}: has {format_bytes(free)} free, needs {format_bytes(n_bytes)}")
    file = AtomicFile(path, n_bytes, force=True, error=EngineError)
    try:
        at = 0
        for part in (head, *(_bytes(array) for _, _, array in arrays), *states):
            file.write_at(at, part)
            at += len(part)
        file.commit()
    finally:
        file.abort()


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
