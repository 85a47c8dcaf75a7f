"""Forward passes in this process, by a loaded copy of the model whose tensors are patched."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.core.scratch import scratch_folder
from ramgguf.gguf.architecture import first_layer
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.forward import (
    Change,
    ForwardRequest,
    ForwardResult,
    fingerprint,
    joint_fingerprint,
)
from ramgguf.llama.model import Logits
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.patched_weights import Floats, PatchedWeights
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.reference_logits import ReferenceLogits
from ramgguf.llama.residuals import Rows
from ramgguf.llama.system import cpu_name, system_info
from ramgguf.llama.tokens import TokenRequest, draw_sequences, draw_sets
from ramgguf.quants.imatrix import Imatrix


class LocalRunner:
    """Forward passes over a copy of the file in `folder`, on `threads` threads; a context manager.

    folder is by default the system's for temporary files. What is there has no name: nothing is
    left of it however this process ends. With a stand-in, the copy is one of that format, and all
    that is said of the original is of it.

    Raises EngineError when llama.cpp fails, GGUFError when the file is changed meanwhile.
    """

    n_workers = 1

    def __init__(
        self,
        file: GGUFFile,
        folder: Path | None,
        *,
        n_ctx: int,
        threads: int,
        encoder: str,
        imatrix: Imatrix | None,
        stand_in: str | None = None,
    ) -> None:
        self._file = file
        with scratch_folder(folder, error=EngineError) as scratch:  # the copy loses its names
            self._probe = PatchedModel(
                file, scratch, n_ctx=n_ctx, n_threads=threads, stand_in=stand_in
            )
        self._weights = PatchedWeights(file, self._probe, encoder, imatrix, threads)
        self._formats: dict[str, str] = {}
        self._nmse: dict[Change, float] = {}
        self._references = ReferenceLogits(folder or Path(tempfile.gettempdir()))
        self._residual_layer: int | None = None
        self._kept_residuals: dict[bytes, Rows] = {}
        self._refused: dict[int, str] = {}  # layers at which passes cannot begin, and why

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._probe.__exit__(kind, e, at)
        self._references.clear()

    @property
    def n_vocab(self) -> int:
        """Tokens in the model's vocabulary."""
        return self._probe.model.vocab.n_tokens

    @property
    def build(self) -> str:
        """Which llama.cpp runs."""
        return system_info().build

    @property
    def cpus(self) -> tuple[str, ...]:
        """This machine's."""
        return (cpu_name(),)

    @property
    def reload_seconds(self) -> float | None:
        """What loading the copy takes; None where it can be loaded from the first layer on only."""
        return self._probe.load_seconds if self._probe.n_layers > 1 else None

    def draw(self, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
        """Return the sequences of these numbers."""
        self._make(())
        self._probe.start_at(0)
        return draw_sequences(self._probe.model, request, indices)

    def draw_sets(
        self, request: TokenRequest, sizes: Sequence[int], first: int
    ) -> tuple[tuple[TokenIds, ...], ...]:
        """Return sets of sequences."""
        self._make(())
        self._probe.start_at(0)
        return draw_sets(self._probe.model, request, sizes, first)

    def seconds(self, ids: TokenIds) -> float:
        """Return how long one pass over the sequence takes, its comparison included."""
        reference = self._reference(ids)
        self._probe.start_at(0)
        start = time.perf_counter()
        self._probe.divergence(ids, reference)
        return time.perf_counter() - start

    def prepare(self, sequences: Sequence[TokenIds]) -> str:
        """Return the fingerprint of what the original makes of the sequences."""
        return joint_fingerprint(self.fingerprints(sequences))

    def fingerprints(self, sequences: Sequence[TokenIds]) -> list[str]:
        """Return the fingerprint of each sequence."""
        return [fingerprint(self._reference(ids)) for ids in sequences]

    def run(self, wanted: Sequence[ForwardRequest]) -> Iterator[tuple[int, ForwardResult]]:
        """Yield what the passes find, in their order."""
        for position, one in enumerate(wanted):
            references = [self._reference(ids) for ids in one.sequences]
            why_whole = self._start(one)
            kld, errors = np.empty(0), None
            if one.end is None:
                self._make(one.changes)
                pairs = zip(one.sequences, references, strict=True)
                kld = np.concatenate([self._probe.divergence(ids, logits) for ids, logits in pairs])
            else:
                errors = self._errors(one, one.end)
            self._file.require_unchanged()
            nmse = tuple(self._nmse[change] for change in one.changes)
            yield position, ForwardResult(kld, nmse, why_whole, errors)

    def _errors(self, one: ForwardRequest, end: int) -> Floats | None:
        """Return the relative squared error of the residual stream after the layer, by token; None
        where llama.cpp's graph does not name it.
        """
        try:
            before = [self._residuals(ids, end) for ids in one.sequences]
            self._make(one.changes)
            after = [self._probe.residuals(ids, end) for ids in one.sequences]
        except EngineError:
            self._make(one.changes)
            return None
        parts = [_relative(b, a) for b, a in zip(before, after, strict=True)]
        return np.concatenate(parts)

    def _residuals(self, ids: TokenIds, layer: int) -> Rows:
        """Return the original's residual stream after the layer; only one layer's is kept."""
        if self._residual_layer != layer:
            self._residual_layer, self._kept_residuals = layer, {}
        key = ids.tobytes()
        if key not in self._kept_residuals:
            self._make(())
            self._kept_residuals[key] = self._probe.residuals(ids, layer)
        return self._kept_residuals[key]

    def _start(self, one: ForwardRequest) -> str | None:
        """Load the copy from where the pass may begin; return why it is whole, if it has to be.

        A layer will do where the original's logits come out of it bit by bit as of the whole model:
        of one sequence, since all are computed alike.
        """
        layer, sequences = one.start, one.sequences
        tied, n_layers = self._file.has_tied_embedding, self._probe.n_layers
        if any(first_layer(name, n_layers, tied=tied) < layer for name, _ in one.changes):
            raise EngineError(f"layer {layer} is after the changes; this is a bug of ramgguf")
        if self._probe.starts_there(layer, sequences):
            return None
        if layer and layer not in self._refused:
            self._make(())
            try:
                self._probe.start_at(layer, sequences)
                if self._probe.has_logits(sequences[0], self._reference(sequences[0])):
                    return None
                self._refused[layer] = f"from layer {layer} on it computes other logits"
            except EngineError as e:
                self._refused[layer] = str(e)
        self._probe.start_at(0)
        return self._refused.get(layer)

    def _make(self, changes: Sequence[Change]) -> None:
        """Give the copy these formats, and the original's weights in all other tensors."""
        wanted = dict(changes)
        for name in [n for n in self._formats if n not in wanted]:
            self._weights.put(name, self._file.tensor(name).type_name)
            del self._formats[name]
        for name, format_name in wanted.items():
            if self._formats.get(name) != format_name:
                self._formats[name] = ""  # whatever is there, should this fail
                nmse = self._weights.put(name, format_name)
                self._nmse[name, format_name] = nmse
                self._formats[name] = format_name

    def _reference(self, ids: TokenIds) -> Logits:
        """Return the original's logits; where they were not kept, the copy is the original now."""
        key = ids.tobytes()
        if key not in self._references:
            self._make(())
            if not self._probe.can_read(ids):
                self._probe.start_at(0)
            shape = len(ids), self.n_vocab
            self._references.add(key, shape, lambda out: self._probe.logits_into(out, ids))
        return self._references[key]


def _relative(before: Rows, after: Rows) -> Floats:
    """Return Σ(after − before)² / Σ before² of every row."""
    squares: Floats = np.square(before, dtype=np.float64).sum(-1)
    changes: Floats = np.square(after - before, dtype=np.float64).sum(-1)
    return np.divide(changes, squares, out=np.zeros_like(squares), where=squares > 0)
