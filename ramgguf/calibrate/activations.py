"""Importance matrices and Hessians of a model, from the inputs of its weights.

llama.cpp decodes tokens in a child process; an evaluation callback adds up the inputs of every
matrix multiplication. With tokens drawn from the model itself no data are needed.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ramgguf.calibrate.sources import TokenSource, parse_sources, shares
from ramgguf.core.errors import EngineError, ImatrixError
from ramgguf.core.files import refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_seconds
from ramgguf.gguf.architecture import is_multiplied
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import (
    Collect,
    Collected,
    Draw,
    Drawn,
    Observe,
    Observed,
    Tapped,
    TapWeights,
)
from ramgguf.llama.tokens import N_CTX, TokenRequest
from ramgguf.quants.hessian import gram_name, groups, new_hessians
from ramgguf.quants.imatrix import InputSquares, write_imatrix

N_SEQUENCES = 12
MAX_GRAM_BYTES = 4 << 30


@dataclass(frozen=True)
class Outputs:
    """Where the importance matrix goes, and the Hessians of the weights whose name a regex finds.

    At most max_gram_bytes of Hessians are in memory at a time; the tokens are read once more for
    every such batch.
    """

    imatrix: Path
    hessian: Path | None = None
    pattern: str = "."
    max_gram_bytes: int = MAX_GRAM_BYTES
    force: bool = False


@dataclass(frozen=True)
class Calibration:
    """What was written: entries, and the weights that were asked for and met no input.

    n_unused counts the experts that saw no token; n_grams the Hessians, 0 without.
    """

    outputs: Outputs
    n_entries: int
    n_sequences: int
    n_tokens: int
    n_unused: int
    missed: tuple[str, ...]
    n_grams: int
    seconds: float


def calibrate_file(
    file: GGUFFile,
    request: TokenRequest,
    sources: Sequence[TokenSource],
    outputs: Outputs,
    *,
    threads: int,
    progress: Progress,
    announce: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Write the importance matrix of the model, and Hessians if wanted; return what was written.

    The sources share the sequences by their weights; what else the request says is for all.
    announce gets the estimated cost after the first sequence. Raises EngineError when llama.cpp
    fails, ImatrixError when nothing can be written; then no file is left.
    """
    start = time.perf_counter()
    for path in (outputs.imatrix, outputs.hessian):
        if path is not None:
            refuse_existing(path, force=outputs.force, error=ImatrixError)
    tied = file.has_tied_embedding
    weights = {
        t.name: t
        for t in file.tensors
        if is_multiplied(t.name, t.shape, file.architecture, tied=tied)
    }
    n_sequences = request.n_sequences or N_SEQUENCES
    with (
        Engine(
            [file.paths[0]], n_ctx=request.n_ctx, n_threads=threads, safe_kernels=True
        ) as engine,
        scratch_folder(None, error=EngineError) as folder,
    ):
        run = _Run(engine, request, folder, progress, announce)
        sequences = [
            ids
            for source, n in zip(sources, shares(sources, n_sequences), strict=True)
            for ids in run.draw(source, n)
        ]
        if outputs.hessian is None:
            entries, n_grams = run.sums(run.observe(sequences, tuple(weights))), 0
        else:
            entries, n_grams = _write_hessians(run, sequences, outputs, weights, file.sample_sha256)
    write_imatrix(
        outputs.imatrix,
        entries,
        dataset=dataset_name(sources, request.seed),
        n_chunks=n_sequences,
        chunk_size=request.n_ctx,
        model_sample=file.sample_sha256,
        force=outputs.force,
    )
    return Calibration(
        outputs=outputs,
        n_entries=sum(bool(e.counts.any()) for e in entries.values()),
        n_sequences=n_sequences,
        n_tokens=n_sequences * request.n_ctx,
        n_unused=sum(int((e.counts == 0).sum()) for e in entries.values()),
        missed=tuple(n for n in weights if n not in entries or not entries[n].counts.any()),
        n_grams=n_grams,
        seconds=time.perf_counter() - start,
    )


def dataset_name(sources: Sequence[TokenSource], seed: int) -> str:
    """Return what the matrix says of its tokens."""
    named = [s.corpus.name if s.corpus else f"{s.kind}-drawn tokens" for s in sources]
    weights = [f" {s.weight:.0%}" if len(sources) > 1 else "" for s in sources]
    told = " + ".join(name + weight for name, weight in zip(named, weights, strict=True))
    return f"{told}, seed {seed}"


class _Run:
    """A child with the model, and the tokens it is to read."""

    def __init__(
        self,
        engine: Engine,
        request: TokenRequest,
        folder: Path,
        progress: Progress,
        announce: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._request = request
        self._folder = folder
        self._progress = progress
        self._announce = announce

    def draw(self, source: TokenSource, n_sequences: int) -> Sequence[str]:
        """Return sequences of the source, packed."""
        if n_sequences == 0:
            return []
        request, corpus = self._request, source.corpus
        asked = Draw(
            tokens=source.kind,
            n_ctx=request.n_ctx,
            seed=request.seed,
            indices=tuple(range(n_sequences)),
            name=corpus.name if corpus else "",
            text=corpus.text if corpus else None,
            control_tokens=corpus is not None and corpus.has_control_tokens,
        )
        drawn: list[str] = []
        self._progress.start("draw tokens", n_sequences, "sequences")
        try:
            found = self._engine.ask(asked, Drawn)
            if source.kind == "self":
                self._announce(
                    f"{n_sequences} sequences of {request.n_ctx} tokens (self), about "
                    f"{format_seconds(n_sequences * found.seconds)} to draw"
                )
            drawn.append(found.ids)
            self._progress.advance(1)
            for _ in range(1, n_sequences):
                drawn.append(self._engine.receive(Drawn).ids)
                self._progress.advance(1)
        finally:
            self._progress.finish()
        return drawn

    def observe(
        self, sequences: Sequence[str], names: tuple[str, ...], grams: tuple[str, ...] = ()
    ) -> Collected:
        """Decode the sequences under a tap; what it took is in the folder afterwards."""
        self._engine.ask(TapWeights(names=names, grams=grams), Tapped)
        self._progress.start("calibrate", len(sequences), "sequences")
        try:
            for number, ids in enumerate(sequences):
                seconds = self._engine.ask(Observe(ids=ids), Observed).seconds
                if number == 0:
                    self._announce(
                        f"about {format_seconds(len(sequences) * seconds)} to read them"
                        + (f", with XᵀX of {len(grams)} inputs" if grams else "")
                    )
                self._progress.advance(1)
        finally:
            self._progress.finish()
        return self._engine.ask(Collect(folder=str(self._folder)), Collected)

    def n_tokens(self, sequences: Sequence[str]) -> int:
        """Return the number of tokens of the sequences."""
        return len(sequences) * self._request.n_ctx

    def sums(self, found: Collected) -> dict[str, InputSquares]:
        """Return the sums of what was seen."""
        return {
            entry.name: InputSquares(
                np.load(self._folder / f"sums-{number}.npy"),
                np.load(self._folder / f"counts-{number}.npy"),
            )
            for number, entry in enumerate(found.sums)
        }

    def grams(self, found: Collected) -> Mapping[str, Path]:
        """Return where the arrays of the grams are, by their owners' names."""
        return {name: self._folder / f"gram-{n}.npy" for n, name in enumerate(found.grams)}


def _write_hessians(
    run: _Run,
    sequences: Sequence[str],
    outputs: Outputs,
    weights: Mapping[str, TensorInfo],
    model_sample: str,
) -> tuple[dict[str, InputSquares], int]:
    """Write XᵀX of the wanted weights' inputs, in batches that fit the memory.

    Return the sums of all weights, taken along with the first batch, and the number of Hessians.
    Which weights share an input is known from one sequence; it must hold for all.
    """
    assert outputs.hessian is not None
    owners = _owners(run.observe(sequences[:1], tuple(weights)))
    while True:
        wanted, sizes = _wanted(owners, outputs, weights)
        entries: dict[str, InputSquares] | None = None
        seen = owners
        with new_hessians(
            outputs.hessian,
            wanted,
            sizes,
            run.n_tokens(sequences),
            model_sample=model_sample,
            force=outputs.force,
        ) as file:
            for group in groups(sizes, outputs.max_gram_bytes):
                found = run.observe(sequences, tuple(weights) if entries is None else group, group)
                if entries is None:
                    entries, seen = run.sums(found), _owners(found)
                    if seen != owners:
                        break
                for owner, path in run.grams(found).items():
                    file.write(gram_name(owner), np.load(path, mmap_mode="r"))
                    path.unlink()
            else:
                file.commit()
                return entries or {}, len(sizes)
        owners = seen  # another sequence runs through other weights


def _owners(found: Collected) -> dict[str, str]:
    return {s.name: s.owner for s in found.sums if s.owner is not None}


def _wanted(
    owners: Mapping[str, str], outputs: Outputs, weights: Mapping[str, TensorInfo]
) -> tuple[dict[str, str], dict[str, int]]:
    """Return the owner of each weight that gets a Hessian, and the columns of each owner."""
    try:
        wanted = {n: o for n, o in owners.items() if re.search(outputs.pattern, n)}
    except re.error as e:
        raise ImatrixError(f"{outputs.pattern!r} is not a regular expression: {e}") from None
    if not wanted:
        raise ImatrixError(f"no weight with inputs has a name like {outputs.pattern!r}")
    sizes = {owner: weights[owner].row_length for owner in wanted.values()}
    largest = 4 * max(sizes.values()) ** 2
    if largest > outputs.max_gram_bytes:
        raise EngineError(
            f"the largest Hessian takes {format_bytes(largest)}, more than the "
            f"{format_bytes(outputs.max_gram_bytes)} allowed; leave that weight out"
        )
    return wanted, sizes


@protected()
def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    tokens: str = "self",
    n_sequences: int = N_SEQUENCES,
    n_ctx: int = N_CTX,
    seed: int = 0,
    hessian: str | Path | None = None,
    hessian_pattern: str = ".",
    max_gram_bytes: int = MAX_GRAM_BYTES,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Write the model's importance matrix (llama.cpp's GGUF format) and return what was written.

    tokens is self (drawn from the model), mix (the package's texts of several domains), random,
    wikitext, a text file, or several of these with weights: self,mix,FILE:2. n_sequences of n_ctx
    are read. hessian also takes XᵀX of the inputs of the weights whose name hessian_pattern finds.
    announce gets the cost once it is known.

    Raises GGUFError, ImatrixError for outputs that cannot be written, EngineError when llama.cpp is
    missing or fails.
    """
    request = TokenRequest(encoder="rtn", n_sequences=n_sequences, n_ctx=n_ctx, seed=seed)
    outputs = Outputs(
        Path(output),
        Path(hessian) if hessian is not None else None,
        hessian_pattern,
        max_gram_bytes,
        force,
    )
    with open_gguf(local_path(model), kind_check=True) as file:
        return calibrate_file(
            file,
            request,
            parse_sources(tokens, file),
            outputs,
            threads=threads or default_threads(),
            progress=progress or Silent(),
            announce=announce,
        )
