"""The child's side of calibration: tokens are drawn or read by a model under a tap."""

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
    TokenIds,
    pack_ids,
    unpack_ids,
)
from ramgguf.llama.tokens import drawn_together, wanted_by

_REPORT_SECONDS = 0.5


class Observer:
    """A model under a tap, which reads sequences, and draws them too.

    Tokens that are drawn without the tap are drawn by the model that the worker has loaded.
    """

    def __init__(
        self, send: Callable[[FrozenModel], None], open_model: Callable[[Tap], LlamaModel]
    ) -> None:
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
        """Answer the sequences of these numbers, and meanwhile how many tokens there are."""
        tap: Tap | None = None
        if request.is_tapped:
            model, tap = self._tapped()
            tap.skips_head = False
        model.rest()  # sequences are drawn in a context for all of them
        report = _Report(self._send)
        for batch in drawn_together(
            model, wanted_by(request), request.indices, tap=tap, on_step=report.add
        ):
            for ids in batch:
                report.add_sequence(ids)

    def tap(self, request: TapWeights) -> None:
        """Put a new tap on the weights of these names; what an earlier one took is forgotten."""
        self.close()
        self._tap = Tap(request.names, request.grams, head=request.head)
        self._model = self._open_model(self._tap)
        self._tap.n_threads = self._model.n_threads
        self._send(Tapped())

    def observe(self, request: Observe) -> None:
        """Decode a sequence under the tap."""
        model, tap = self._tapped()
        start = time.perf_counter()
        tap.skips_head = True
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


class _Report:
    """Says how many tokens were drawn, not more often than is worth a message."""

    def __init__(self, send: Callable[[FrozenModel], None]) -> None:
        self._send = send
        self._n_tokens = 0
        self._last = time.perf_counter()

    def add(self, n_tokens: int) -> None:
        """Count tokens that were drawn."""
        self._n_tokens += n_tokens
        if time.perf_counter() - self._last >= _REPORT_SECONDS:
            self._report(None)

    def add_sequence(self, ids: TokenIds) -> None:
        """Answer a sequence that is complete."""
        self._report(pack_ids(ids))

    def _report(self, ids: str | None) -> None:
        now = time.perf_counter()
        self._send(Drawn(n_tokens=self._n_tokens, seconds=now - self._last, ids=ids))
        self._n_tokens, self._last = 0, now


def _save(folder: Path, taken: Taken) -> None:
    for number, sums in enumerate(taken.sums.values()):
        np.save(folder / f"sums-{number}.npy", sums.squares)
        np.save(folder / f"counts-{number}.npy", sums.counts)
    for number, gram in enumerate(taken.grams.values()):
        np.save(folder / f"gram-{number}.npy", gram)
