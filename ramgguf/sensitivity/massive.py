"""Massive activations: the tensors on which a model's first token depends, found by a few tokens.

In many models the first token of a text carries activations hundreds of times as large as others
(Sun et al. 2024, arXiv 2402.17762). An early feed-forward block makes them, a late one takes them
back: what an error there leaves of them drowns everything else at that token. The inputs of
ffn_down show these blocks; forward passes with one tensor quantized show which ones matter.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ramgguf.cluster.runners import opened
from ramgguf.core.documents import Document, FrozenModel, NonNegativeFloat, Positive
from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_count, format_seconds
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import is_multiplied, layer_of, part_of
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import Source
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.client import Engine
from ramgguf.llama.domains import domain_corpora
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.protocol import (
    Observe,
    Observed,
    Tapped,
    TapWeights,
    TokenIds,
    pack_ids,
)
from ramgguf.llama.tokens import TokenRequest
from ramgguf.quants.stand_in import ReadyStandIn
from ramgguf.sensitivity.alpha import is_probed
from ramgguf.sensitivity.readings import probe_format

N_FIRST = 8  # first tokens whose inputs are compared
N_LATER = 128  # tokens of a window, for all others
RATIO = 10.0  # of mean energy, first tokens to others, from which on an input is massive
N_SEQUENCES, N_CTX = 4, 8  # windows of the forward passes
SETTLED = 2  # of their tokens, from which on none is a first one any more


class FirstTokenReading(FrozenModel):
    """What one tensor's quantization does to the first prediction of a text, and to later ones.

    KLD in nats per token; nmse is of the format.
    """

    name: str
    row_length: Positive
    format: str
    nmse: NonNegativeFloat
    kld_first: NonNegativeFloat
    kld_later: NonNegativeFloat


class MassiveActivations(Document):
    """Where a model has massive activations, and what its tensors there do to first tokens.

    ratios has, by ffn_down tensor, the energy of its input at a first token over that at others;
    readings are of the feed-forward tensors in layers whose ratio is RATIO or more.
    """

    KIND: ClassVar[str] = "massive-activations"

    ramgguf_version: str
    source: Source
    ratios: dict[str, NonNegativeFloat]
    readings: tuple[FirstTokenReading, ...]
    seconds: NonNegativeFloat = 0.0

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers with massive activations, in their order."""
        found = {layer_of(name) for name, ratio in self.ratios.items() if ratio >= RATIO}
        return tuple(sorted(layer for layer in found if layer is not None))


def massive_activations(
    model: str | Path,
    *,
    stand_in: ReadyStandIn | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> MassiveActivations:
    """Return where the model has massive activations, by a few dozen passes over a few tokens.

    Needs no data. The passes run on the stand-in, where there is one. Raises GGUFError for what is
    no model, EngineError when llama.cpp fails.
    """
    start = time.perf_counter()
    threads, shown = threads or default_threads(), progress or Silent()
    path = local_path(model)
    with open_gguf(path, kind_check=True) as file:
        source = Source.of(file)
        windows, ratios = _ratios(file, stand_in.path if stand_in else file.paths[0], threads)
        layers = {layer_of(name) for name, ratio in ratios.items() if ratio >= RATIO}
        tensors = [
            t
            for t in file.tensors
            if layer_of(t.name) in layers
            and part_of(t.name, file.architecture).startswith("ffn_")
            and is_probed(file, t)
        ]
    readings: tuple[FirstTokenReading, ...] = ()
    if tensors:
        form = stand_in.form if stand_in else None
        readings = _read(path, form, tensors, windows, threads, shown, announce)
    return MassiveActivations(
        ramgguf_version=__version__,
        source=source,
        ratios=ratios,
        readings=readings,
        seconds=time.perf_counter() - start,
    )


def _ratios(
    file: GGUFFile, run_on: Path, threads: int
) -> tuple[tuple[TokenIds, ...], dict[str, float]]:
    """Return windows of a text, and the energies' ratios by ffn_down tensor.

    Without BOS any token can be the first one; with BOS, none but that.
    """
    names = tuple(
        t.name
        for t in file.tensors
        if part_of(t.name, file.architecture).startswith("ffn_down")
        and is_multiplied(t.name, t.shape, file.architecture, tied=file.has_tied_embedding)
    )
    text = domain_corpora(file, "calibrate")["prose"].text
    with (
        Engine([run_on], n_ctx=N_LATER, n_threads=threads, safe_kernels=True) as engine,
        scratch_folder(None, error=EngineError) as folder,
    ):
        vocab = engine.opened.models[0].vocab
        ids, _ = engine.tokenize(text, add_special=False)
        if len(ids) < N_LATER:
            raise EngineError(f"{file.paths[0]}: its tokenizer makes {len(ids)} tokens of a text")
        apart = len(ids) // N_FIRST
        starts = [ids[i * apart : i * apart + N_LATER].copy() for i in range(N_FIRST)]
        if vocab.adds_bos:
            for window in starts:
                window[0] = vocab.bos
        first = _energies(engine, folder, names, [window[:1] for window in starts])
        whole = _energies(engine, folder, names, starts[:1])
    n = len(starts[0])
    ratios = {}
    for name, energy in first.items():
        later = (n * whole.get(name, 0.0) - energy) / (n - 1)
        # The whole window may hold no more than its own first token's energy.
        later = max(later, whole.get(name, 0.0) / n, 1e-30)
        ratios[name] = min(energy / later, 1e30)
    return tuple(window[:N_CTX] for window in starts[:N_SEQUENCES]), ratios


def _energies(
    engine: Engine, folder: Path, names: tuple[str, ...], sequences: Sequence[TokenIds]
) -> Mapping[str, float]:
    """Return the mean of Σx² over rows x of each weight's input."""
    engine.ask(TapWeights(names=names), Tapped)
    for ids in sequences:
        engine.ask(Observe(ids=pack_ids(ids)), Observed)
    sums = engine.collect(folder / "energies.kept").sums()
    return {n: float(s.squares.sum()) / max(1, int(s.counts.sum())) for n, s in sums.items()}


def _read(
    model: Path,
    form: str | None,
    tensors: Sequence[TensorInfo],
    windows: tuple[TokenIds, ...],
    threads: int,
    progress: Progress,
    announce: Callable[[str], None],
) -> tuple[FirstTokenReading, ...]:
    """Return what each tensor alone does to the windows' predictions."""
    request = TokenRequest(encoder="rtn", n_ctx=N_CTX, stand_in=form)
    readings = []
    with (
        opened(model, request, folder=None, journal=None, threads=threads, executor=None) as at,
        at.opening as passes,
    ):
        passes.prepare(windows)
        seconds = len(windows) * passes.seconds(windows[0])
        announce(
            f"{format_count(len(tensors), 'tensor')} × {format_count(len(windows), 'window')} of "
            f"{N_CTX} tokens, about {format_seconds(len(tensors) * seconds)}"
        )
        progress.start("first tokens", len(tensors), "tensors")
        try:
            asked = [ForwardRequest(((t.name, probe_format(t)),), windows) for t in tensors]
            for position, found in passes.run(asked):
                tensor = tensors[position]
                kld = np.maximum(found.kld.reshape(len(windows), N_CTX), 0.0)
                readings.append(
                    FirstTokenReading(
                        name=tensor.name,
                        row_length=tensor.row_length,
                        format=probe_format(tensor),
                        nmse=found.nmse[0],
                        kld_first=float(kld[:, 0].mean()),
                        kld_later=float(kld[:, SETTLED:].mean()),
                    )
                )
                progress.advance(1)
        finally:
            progress.finish()
    order = {t.name: i for i, t in enumerate(tensors)}
    return tuple(sorted(readings, key=lambda r: order[r.name]))
