"""Importance matrices and Hessians of a model, from the inputs of its weights.

llama.cpp decodes tokens in a child process; an evaluation callback adds up the inputs of every
matrix multiplication. With tokens drawn from the model itself no data are needed, and the inputs
are added up while the tokens are drawn.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from ramgguf.calibrate.partial import Partial, partial_folder
from ramgguf.core.errors import EngineError, ImatrixError
from ramgguf.core.files import free_bytes, refuse_existing, require_distinct
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent, followed_by
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_count, format_seconds
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import HEAD, TOKEN_EMBEDDING, is_multiplied, layer_of
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import FileIdentity
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.client import Engine
from ramgguf.llama.kept import KeptFile
from ramgguf.llama.protocol import (
    Draw,
    Drawn,
    Observe,
    Observed,
    Resumed,
    SystemInfo,
    Tapped,
    TapWeights,
    pack_ids,
)
from ramgguf.llama.sources import dataset_name, parse_sources, shares
from ramgguf.llama.tokens import N_CTX, TokenRequest, TokenSource
from ramgguf.quants.hessian import gram_name, groups, new_hessians
from ramgguf.quants.imatrix import InputSquares, write_imatrix
from ramgguf.quants.stand_in import ReadyStandIn, StandIn, chosen_stand_in, write_stand_in

N_SEQUENCES = 12
MAX_GRAM_BYTES = 4 << 30
_FEW = 16  # tokens that show whether layers that draft are run


@dataclass(frozen=True)
class Outputs:
    """Where the importance matrix goes, and the Hessians of the weights whose name a regex finds.

    At most max_gram_bytes of Hessians are in memory at a time; the tokens are read once more for
    every such batch after the first. scratch takes a stand-in meanwhile, by default the system's
    folder for temporary files; partial what is done, from which a killed run goes on, by default
    a folder beside the matrix.
    """

    imatrix: Path
    hessian: Path | None = None
    pattern: str = "."
    max_gram_bytes: int = MAX_GRAM_BYTES
    scratch: Path | None = None
    partial: Path | None = None
    force: bool = False

    @property
    def partial_path(self) -> Path:
        """The folder from which a killed run goes on."""
        return self.partial or self.imatrix.with_name(f"{self.imatrix.name}.partial")


@dataclass(frozen=True)
class Calibration:
    """What was written: entries, and the weights that were asked for and had no input.

    n_unused counts the experts that saw no token; n_grams the Hessians, 0 without. stand_in is the
    format of the stand-in that read the tokens, None for the model itself. Of n_tokens, n_resumed
    were read by an earlier run that was killed.
    """

    outputs: Outputs
    n_entries: int
    n_sequences: int
    n_tokens: int
    n_unused: int
    missed: tuple[str, ...]
    n_grams: int
    seconds: float
    stand_in: str | None = None
    n_resumed: int = 0


def calibrate_file(
    file: GGUFFile,
    request: TokenRequest,
    sources: Sequence[TokenSource],
    outputs: Outputs,
    *,
    threads: int,
    progress: Progress,
    announce: Callable[[str], None] = lambda _: None,
    ready: Path | None = None,
) -> Calibration:
    """Write the importance matrix of the model, and Hessians if wanted; return what was written.

    The sources share the sequences by their weights; what else the request says is for all. With a
    stand-in, that is written first (unless one is ready) and reads the tokens.
    announce gets the estimated cost once a part is done. Raises EngineError when llama.cpp
    fails, ImatrixError when nothing can be written; then no file is left.
    """
    start = time.perf_counter()
    require_distinct(outputs.imatrix, outputs.hessian, error=ImatrixError)
    for path in (outputs.imatrix, outputs.hessian):
        if path is not None:
            refuse_existing(path, force=outputs.force, error=ImatrixError)
    weights = {
        t.name: t
        for t in file.tensors
        if is_multiplied(t.name, t.shape, file.architecture, tied=file.has_tied_embedding)
    }
    n_sequences = request.n_sequences or N_SEQUENCES
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(outputs.scratch, error=EngineError))
        kept_in = stack.enter_context(partial_folder(outputs.partial_path))
        path = file.paths[0]
        if ready is not None:
            path = ready
        elif request.stand_in is not None:
            path = folder / "stand-in.gguf"
            write_stand_in(file, request.stand_in, path, threads=threads, progress=progress)
        engine = stack.enter_context(
            Engine([path], n_ctx=request.n_ctx, n_threads=threads, safe_kernels=True)
        )
        head = TOKEN_EMBEDDING if file.has_tied_embedding else HEAD
        drafts = _run_drafts(path, tuple(weights), file.draft_layers, threads, announce)
        run = _Run(engine, request, folder, head, drafts, progress, announce)
        owners: Mapping[str, str] = {}
        if outputs.hessian is not None:
            owners = _wanted_owners(run.owners(tuple(weights)), weights, outputs)
        gram_bytes = _gram_bytes(owners, weights)
        if kept_in is not None and _has_room(kept_in, gram_bytes, announce):
            system = engine.opened.system
            settings = _settings(file, request, sources, outputs, system, threads, drafts)
            run.partial = Partial(kept_in, settings, spare=gram_bytes)
        first, later = _gram_groups(owners, weights, outputs.max_gram_bytes)
        quotas = tuple(zip(sources, shares(sources, n_sequences), strict=True))
        with _before_hessians(progress, len(later)):
            found = run.read(quotas, tuple(weights), first)
        entries = {name: InputSquares(s.squares, s.counts) for name, s in found.sums().items()}
        n_grams = 0
        if outputs.hessian is not None:
            n_grams = _write_hessians(
                run, found, owners, later, outputs, weights, file, request.stand_in
            )
        write_imatrix(
            outputs.imatrix,
            entries,
            dataset=dataset_name(sources, request.seed, request.stand_in),
            n_chunks=n_sequences,
            chunk_size=request.n_ctx,
            model_sample=file.sample_sha256,
            stand_in=request.stand_in,
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
        stand_in=request.stand_in,
        n_resumed=run.n_resumed,
    )


def _settings(
    file: GGUFFile,
    request: TokenRequest,
    sources: Sequence[TokenSource],
    outputs: Outputs,
    system: SystemInfo,
    threads: int,
    drafts: tuple[int, ...],
) -> str:
    """Return all that the sums of a run depend on: another run's are not gone on from."""
    model = FileIdentity.of(file)
    texts = [
        (s.kind, s.weight, s.corpus and hashlib.sha256(s.corpus.bytes).hexdigest()) for s in sources
    ]
    parts = (
        __version__, model.n_bytes, model.header_sha256, model.sample_sha256, request.stand_in,
        request.n_sequences, request.n_ctx, request.seed, texts, outputs.pattern,
        outputs.max_gram_bytes, system.model_dump(), threads, drafts,
    )  # fmt: skip
    return json.dumps(parts)


def _run_drafts(
    path: Path,
    names: tuple[str, ...],
    layers: frozenset[int],
    threads: int,
    announce: Callable[[str], None],
) -> tuple[int, ...]:
    """Return the layers that draft tokens if llama.cpp runs them here; else none, and a line.

    They are tried in a child of their own: llama.cpp ends the process for an architecture that it
    has no graph of drafts for.
    """
    if not layers:
        return ()
    drafts = tuple(sorted(layers))
    try:
        with (
            scratch_folder(None, error=EngineError) as folder,
            Engine([path], n_ctx=_FEW, n_threads=threads, safe_kernels=True) as engine,
        ):
            engine.ask(TapWeights(names=names, draft_layers=drafts), Tapped)
            engine.ask(Observe(ids=pack_ids(np.zeros(_FEW, np.int32))), Observed)
            sums = engine.collect(folder / "drafts.kept").sums()
    except EngineError as e:
        announce(f"layers that draft tokens are not run here, their matrices get no entry: {e}")
        return ()
    if not any(layer_of(name) in layers for name in sums):
        announce("llama.cpp leaves the layers that draft tokens out: they get no entry")
        return ()
    return drafts


def _gram_bytes(owners: Mapping[str, str], weights: Mapping[str, TensorInfo]) -> int:
    return sum(4 * weights[owner].row_length ** 2 for owner in set(owners.values()))


def _has_room(folder: Path, gram_bytes: int, announce: Callable[[str], None]) -> bool:
    """Return whether the disk has room for the Hessians twice: kept, and in their file."""
    free = free_bytes(folder)
    if free >= 2 * gram_bytes:
        return True
    announce(
        f"a run that is killed starts over: to keep what is done, {folder.parent} would need "
        f"{format_bytes(2 * gram_bytes)}, {format_bytes(free)} are free"
    )
    return False


def _before_hessians(progress: Progress, n: int) -> AbstractContextManager[None]:
    """Let the progress show that n passes for Hessians come next, if any do."""
    return followed_by(progress, f"{format_count(n, 'pass')} for Hessians") if n else nullcontext()


class _Run:
    """A child with the model under a tap, and the sequences that it has read.

    What a pass takes is in a file of its own, in the folder of partial: one for the time being, or
    one from which a killed run goes on.
    """

    def __init__(
        self,
        engine: Engine,
        request: TokenRequest,
        folder: Path,
        head: str,
        drafts: tuple[int, ...],
        progress: Progress,
        announce: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._request = request
        self._head = head
        self._drafts = drafts  # layers that every sequence is read by, after the trunk
        self._progress = progress
        self._announce = announce
        self._sequences: list[str] = []
        self.n_resumed = 0  # of the tokens that were read, those by an earlier run
        self.partial = Partial(folder, is_kept=False)
        self._n_passes = 0
        self._resumed = Resumed()
        self._n_skipped = 0  # of the events of this pass, those that an earlier run has done

    @property
    def n_tokens(self) -> int:
        """The number of tokens that were read."""
        return len(self._sequences) * self._request.n_ctx

    def owners(self, names: tuple[str, ...]) -> Mapping[str, str]:
        """Return which weight's input each weight has, from a pass over a few tokens."""
        number, _ = self._begin(names, ())
        self._engine.ask(Observe(ids=pack_ids(np.zeros(2, np.int32))), Observed)
        return self._collect(number, ()).header.owners

    def read(
        self,
        quotas: Sequence[tuple[TokenSource, int]],
        names: tuple[str, ...],
        grams: tuple[str, ...],
    ) -> KeptFile:
        """Read so many sequences of each source; return what the pass takes.

        The inputs of these weights are added up, and XᵀX of these.
        """
        number, whole = self._begin(names, grams)
        resumed = self._resumed
        draws = iter(whole.header.draws if whole is not None else resumed.draws)
        for source, n_sequences in quotas:
            if n_sequences == 0:
                continue
            if source.kind != "self" or self._drafts:
                drawn = self._draw(source, n_sequences)
                if whole is None:
                    self._read_sequences(drawn)
            elif whole is not None or self._skips():
                drawn = list(next(draws))
            else:
                drawn = self._draw(source, n_sequences)
            self._sequences += drawn
        n_read = resumed.n_events - len(resumed.draws) + sum(map(len, resumed.draws))
        self.n_resumed = n_read * self._request.n_ctx + resumed.n_drawn
        if whole is not None:
            self.n_resumed = self.n_tokens
        return whole if whole is not None else self._collect(number, grams)

    def read_again(self, grams: tuple[str, ...], n_more: int) -> KeptFile:
        """Read all sequences once more, for XᵀX of these weights' inputs.

        n_more such passes follow.
        """
        number, whole = self._begin(grams, grams)
        if whole is not None:
            return whole
        with _before_hessians(self._progress, n_more):
            self._read_sequences(
                self._sequences, f", with XᵀX of {format_count(len(grams), 'input')}"
            )
        return self._collect(number, grams)

    def _begin(self, names: tuple[str, ...], grams: tuple[str, ...]) -> tuple[int, KeptFile | None]:
        """Begin a pass, and return its number, and its file if an earlier run has ended it."""
        number, self._n_passes = self._n_passes, self._n_passes + 1
        self._resumed = Resumed()
        whole = self.partial.whole(number, grams)
        if whole is None:
            asked = TapWeights(names=names, grams=grams, head=self._head, draft_layers=self._drafts)
            self._engine.ask(asked, Tapped)
            if self.partial.is_kept:
                self._resumed = self._engine.ask(self.partial.keep(number, grams), Resumed)
        self._n_skipped = self._resumed.n_events
        if whole is not None or self._n_skipped or self._resumed.n_drawn:
            self._announce(f"pass {number} goes on from {self.partial.folder}")
        return number, whole

    def _collect(self, number: int, grams: tuple[str, ...]) -> KeptFile:
        """Return what the tap took, in the file of the pass."""
        return self._engine.collect(self.partial.path(number), self.partial.key(number, grams))

    def _skips(self) -> bool:
        """Return whether an earlier run has done the next event of the pass."""
        if self._n_skipped == 0:
            return False
        self._n_skipped -= 1
        return True

    def _draw(self, source: TokenSource, n_sequences: int) -> list[str]:
        """Return sequences of the source, packed; the model's own are drawn under the tap."""
        request, corpus = self._request, source.corpus
        is_own = source.kind == "self" and not self._drafts
        asked = Draw(
            tokens=source.kind,
            n_ctx=request.n_ctx,
            seed=request.seed,
            indices=tuple(range(n_sequences)),
            name=corpus.name if corpus else "",
            text=corpus.text if corpus else None,
            control_tokens=corpus is not None and corpus.has_control_tokens,
            is_tapped=is_own,
        )
        total, drawn = n_sequences * request.n_ctx, list[str]()
        if is_own:  # an earlier run may have drawn some
            total -= self._resumed.n_drawn
            self._resumed = self._resumed.model_copy(update={"n_drawn": 0})
        self._progress.start("calibrate" if is_own else "draw tokens", total, "tokens")
        try:
            found = self._engine.ask(asked, Drawn)
            for number in count(1):
                self._progress.advance(found.n_tokens)
                if is_own and number == 2 and found.n_tokens:  # the first step is slow
                    seconds = total * found.seconds / found.n_tokens
                    self._announce(
                        f"{format_count(n_sequences, 'sequence')} of {request.n_ctx} tokens "
                        f"(self), about {format_seconds(seconds)} to draw"
                    )
                if found.ids is not None:
                    drawn.append(found.ids)
                if len(drawn) == n_sequences:
                    break
                found = self._engine.receive(Drawn)
            return drawn
        finally:
            self._progress.finish()

    def _read_sequences(self, sequences: Sequence[str], what: str = "") -> None:
        """Decode the sequences under the tap."""
        n_ctx = self._request.n_ctx
        left = [ids for ids in sequences if not self._skips()]
        if not left:
            return
        self._progress.start("calibrate", len(left) * n_ctx, "tokens")
        try:
            for number, ids in enumerate(left):
                seconds = self._engine.ask(Observe(ids=ids), Observed).seconds
                if number == 0:
                    about = format_seconds(len(left) * seconds)
                    self._announce(f"about {about} to read them{what}")
                self._progress.advance(n_ctx)
        finally:
            self._progress.finish()


def _wanted_owners(
    owners: Mapping[str, str], weights: Mapping[str, TensorInfo], outputs: Outputs
) -> Mapping[str, str]:
    """Return the owners of the inputs of the weights whose name the pattern finds."""
    try:
        wanted = {n: o for n, o in owners.items() if re.search(outputs.pattern, n)}
    except re.error as e:
        raise ImatrixError(f"{outputs.pattern!r} is not a regular expression: {e}") from None
    if not wanted:
        raise ImatrixError(f"no weight with inputs has a name like {outputs.pattern!r}")
    largest = 4 * max(weights[owner].row_length for owner in wanted.values()) ** 2
    if largest > outputs.max_gram_bytes:
        raise EngineError(
            f"the largest Hessian takes {format_bytes(largest)}, more than the "
            f"{format_bytes(outputs.max_gram_bytes)} allowed; leave that weight out"
        )
    return wanted


def _gram_groups(
    owners: Mapping[str, str], weights: Mapping[str, TensorInfo], max_bytes: int
) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """Return the owners whose XᵀX are taken first, and in further passes, as fits the memory."""
    if not owners:
        return (), []
    first, *later = groups({o: weights[o].row_length for o in owners.values()}, max_bytes)
    return first, later


def _write_hessians(
    run: _Run,
    found: KeptFile,
    expected: Mapping[str, str],
    later: Sequence[tuple[str, ...]],
    outputs: Outputs,
    weights: Mapping[str, TensorInfo],
    file: GGUFFile,
    stand_in: str | None,
) -> int:
    """Write XᵀX of the wanted weights' inputs, those in `later` by further passes; return how many.

    The owners are those of the pass: where graphs of other shapes do not share an input that the
    first few tokens shared, XᵀX of its own takes a further pass.
    """
    assert outputs.hessian is not None
    owners = {n: found.header.owners.get(n, owner) for n, owner in expected.items()}
    sizes = {owner: weights[owner].row_length for owner in owners.values()}
    planned = {name for group in later for name in group} | {n for n, _ in found.arrays("gram")}
    parted = {owner: n for owner, n in sizes.items() if owner not in planned}
    with new_hessians(
        outputs.hessian,
        owners,
        sizes,
        run.n_tokens,
        model_sample=file.sample_sha256,
        stand_in=stand_in,
        force=outputs.force,
    ) as output:
        further = (*later, *groups(parted, outputs.max_gram_bytes))
        for number, group in enumerate(((), *further)):
            taken = run.read_again(group, len(further) - number) if group else found
            for owner, gram in taken.arrays("gram"):
                if owner in sizes:
                    output.write(gram_name(owner), gram)
            if not run.partial.is_kept:
                taken.path.unlink()
        output.commit()
    return len(sizes)


@protected()
def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    tokens: str = "mix",
    n_sequences: int = N_SEQUENCES,
    n_ctx: int = N_CTX,
    seed: int = 0,
    hessian: str | Path | None = None,
    hessian_pattern: str = ".",
    max_gram_bytes: int = MAX_GRAM_BYTES,
    stand_in: StandIn | ReadyStandIn = "auto",
    folder: str | Path | None = None,
    partial: str | Path | None = None,
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

    stand_in is what runs the passes: none (the model), q8_0, q6_k or q4_k (a quick quantization of
    it, written to folder meanwhile), auto (the model where it fits the memory, else the largest of
    these that fits), or a stand-in that is there already.

    Every minute, what is done goes to the folder partial, by default OUTPUT.partial: the same call
    goes on from there after a kill, and writes the same bytes. It goes with the end of the run.

    Raises GGUFError, ImatrixError for outputs that cannot be written, EngineError when llama.cpp is
    missing or fails.
    """
    outputs = Outputs(
        Path(output),
        Path(hessian) if hessian is not None else None,
        hessian_pattern,
        max_gram_bytes,
        Path(folder) if folder is not None else None,
        Path(partial) if partial is not None else None,
        force,
    )
    with open_gguf(local_path(model), kind_check=True) as file:
        ready = stand_in if isinstance(stand_in, ReadyStandIn) else None
        if isinstance(stand_in, ReadyStandIn):
            form: str | None = stand_in.form
        else:
            beside = _most_gram_bytes(file, outputs) if hessian is not None else 0
            form = chosen_stand_in(stand_in, file, beside=beside, announce=announce)
        request = TokenRequest(
            encoder="rtn",
            n_sequences=n_sequences,
            n_ctx=n_ctx,
            seed=seed,
            stand_in=form,
        )
        return calibrate_file(
            file,
            request,
            parse_sources(tokens, file),
            outputs,
            threads=threads or default_threads(),
            progress=progress or Silent(),
            announce=announce,
            ready=ready.path if ready is not None else None,
        )


def _most_gram_bytes(file: GGUFFile, outputs: Outputs) -> int:
    """Return the most that the Hessians of a pass take: weights may each have their own input."""
    return min(outputs.max_gram_bytes, sum(4 * t.row_length**2 for t in file.tensors))
