"""The child's side of calibration: tokens are drawn or read by a model under a tap."""

import time
from collections.abc import Callable
from pathlib import Path

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.llama.capture import Tap
from ramgguf.llama.drafting import DraftLayers
from ramgguf.llama.kept import Keeper, KeptHeader, write_kept
from ramgguf.llama.model import LlamaModel, Logits
from ramgguf.llama.protocol import (
    Collect,
    Collected,
    Draw,
    Drawn,
    Keep,
    Observe,
    Observed,
    Resumed,
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
        self, send: Callable[[FrozenModel], None], open_model: Callable[[Tap, bool], LlamaModel]
    ) -> None:
        self._send = send
        self._open_model = open_model
        self._model: LlamaModel | None = None
        self._tap: Tap | None = None
        self._keeper: Keeper | None = None
        self._drafts: DraftLayers | None = None

    def close(self) -> None:
        """Free the context under the tap."""
        if self._drafts is not None:
            self._drafts.close()
        self._drafts = None
        if self._model is not None:
            self._model.close()
        self._model = self._tap = self._keeper = None

    def draw(self, model: LlamaModel, request: Draw) -> None:
        """Answer the sequences of these numbers, and meanwhile how many tokens there are."""
        tap: Tap | None = None
        keeper: Keeper | None = None
        if request.is_tapped:
            model, tap = self._tapped()
            tap.skips_head = False
            keeper = self._keeper
        model.rest()  # sequences are drawn in a context for all of them
        report = _Report(self._send)
        drawn = drawn_together(
            model, wanted_by(request), request.indices, tap=tap, on_step=report.add, kept=keeper
        )
        for number, batch in enumerate(drawn):
            if keeper is not None:
                keeper.add_batch(number, batch)
            for ids in batch:
                report.add_sequence(ids)
        if keeper is not None:
            keeper.add_draw()

    def tap(self, request: TapWeights) -> None:
        """Put a new tap on the weights of these names; what an earlier one took is forgotten."""
        self.close()
        layers = request.draft_layers
        self._tap = Tap(request.names, request.grams, head=request.head, draft_layers=layers)
        self._model = self._open_model(self._tap, bool(layers))
        self._tap.n_threads = self._model.n_threads
        if layers:
            self._drafts = DraftLayers(self._model)
        self._send(Tapped())

    def observe(self, request: Observe) -> None:
        """Decode a sequence under the tap."""
        model, tap = self._tapped()
        start = time.perf_counter()
        tap.skips_head = self._drafts is None
        model.clear()
        if self._drafts is not None:
            self._drafts.clear()
        ids = unpack_ids(request.ids)
        for begin, end in model.chunks(len(ids)):
            model.decode(ids[begin:end])
            tap.check()
            if self._drafts is not None:
                self._draft(self._drafts, ids[begin:end], model.states(end - begin), tap)
        if self._keeper is not None:
            self._keeper.add_read()
        self._send(Observed(seconds=time.perf_counter() - start))

    def _draft(self, layers: DraftLayers, ids: TokenIds, states: Logits, tap: Tap) -> None:
        tap.is_drafting = True
        try:
            layers.decode(ids, states)
            tap.check()
        finally:
            tap.is_drafting = False

    def keep(self, request: Keep) -> None:
        """Keep what the tap takes from now on, after what an earlier run has kept."""
        _, tap = self._tapped()
        self._keeper = Keeper(
            Path(request.path), request.key, tap, seconds=request.seconds, spare=request.spare
        )
        found = self._keeper.restore()
        if found is None:
            self._send(Resumed())
            return
        n_drawn = found.drawing.n_tokens if found.drawing else 0
        self._send(Resumed(n_events=found.n_events, draws=found.draws, n_drawn=n_drawn))

    def collect(self, request: Collect) -> None:
        """Write what the tap took to a file."""
        _, tap = self._tapped()
        _ = tap.taken  # XᵀX is complete
        draws = self._keeper.draws if self._keeper is not None else ()
        header = KeptHeader(key=request.key, is_whole=True, draws=draws)
        write_kept(Path(request.path), tap.state(), header)
        self._send(Collected())

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
