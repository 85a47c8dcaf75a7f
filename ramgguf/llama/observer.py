"""The child's side of calibration: tokens are drawn, then decoded by a model under a tap."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.llama.capture import Taken, Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import (
    Collect,
    Collected,
    CollectedSums,
    Draw,
    Drawn,
    Observe,
    Observed,
    Tapped,
    TapWeights,
    pack_ids,
    unpack_ids,
)
from ramgguf.llama.tokens import batches, draw_sequences, wanted_by


class Observer:
    """A model that draws its own tokens, and a second context of it under a tap.

    Only the second one is under the tap, so drawing is as fast as without.
    """

    def __init__(
        self, send: Callable[[FrozenModel], None], open_model: Callable[[Tap], LlamaModel]
    ):
        self._send = send
        self._open_model = open_model
        self._model: LlamaModel | None = None
        self._tap: Tap | None = None

    def close(self) -> None:
        """Free the context under the tap."""
        if self._model is not None:
            self._model.close()
        self._model = self._tap = None

    def draw(self, model: LlamaModel, request: Draw) -> None:
        """Answer the sequences of these numbers, with each one's share of its batch's time."""
        wanted = wanted_by(request)
        for batch in batches(request.indices):
            start = time.perf_counter()
            drawn = draw_sequences(model, wanted, batch)
            seconds = (time.perf_counter() - start) / len(batch)
            for ids in drawn:
                self._send(Drawn(ids=pack_ids(ids), seconds=seconds))

    def tap(self, request: TapWeights) -> None:
        """Put a new tap on the weights of these names; what an earlier one took is forgotten."""
        self.close()
        self._tap = Tap(request.names, request.grams)
        self._model = self._open_model(self._tap)
        self._send(Tapped())

    def observe(self, request: Observe) -> None:
        """Decode a sequence under the tap."""
        model, tap = self._tapped()
        start = time.perf_counter()
        model.clear()
        ids = unpack_ids(request.ids)
        for begin, end in model.chunks(len(ids)):
            model.decode(ids[begin:end])
            tap.check()
        self._send(Observed(seconds=time.perf_counter() - start))

    def collect(self, request: Collect) -> None:
        """Write what the tap took to a folder, as arrays, and answer what is there."""
        _, tap = self._tapped()
        taken = tap.taken
        try:
            _save(Path(request.folder), taken)
        except OSError as e:
            raise EngineError(f"{request.folder}: cannot be written: {e.strerror or e}") from None
        self._send(
            Collected(
                sums=tuple(CollectedSums(name=n, owner=taken.owners.get(n)) for n in taken.sums),
                grams=tuple(taken.grams),
            )
        )

    def _tapped(self) -> tuple[LlamaModel, Tap]:
        if self._model is None or self._tap is None:
            raise EngineError("there is no tap yet; this is a bug of ramgguf")
        return self._model, self._tap


def _save(folder: Path, taken: Taken) -> None:
    for number, sums in enumerate(taken.sums.values()):
        np.save(folder / f"sums-{number}.npy", sums.squares)
        np.save(folder / f"counts-{number}.npy", sums.counts)
    for number, gram in enumerate(taken.grams.values()):
        np.save(folder / f"gram-{number}.npy", gram)
