"""Runs of models over the sequences of a text: groups that share a reference, crashes survived."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ramgguf.cluster.scorer import RemoteScorer
from ramgguf.cluster.worker_pool import WorkerPool
from ramgguf.core.errors import EngineError
from ramgguf.core.progress import Progress
from ramgguf.core.version import __version__
from ramgguf.core.wikitext import note_of
from ramgguf.evaluate.journal import Journal, SequenceRecord
from ramgguf.evaluate.protocol import EvalProtocol, Tokens, Windows
from ramgguf.evaluate.result import (
    BrokenSequence,
    EngineSettings,
    EvalResult,
    ModelFile,
    SequenceScore,
    sha256_int32,
)
from ramgguf.evaluate.stored_logits import NO_LOGITS, StoredLogits
from ramgguf.evaluate.token_groups import TokenFigures
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.chat_template import start as chat_start
from ramgguf.llama.client import CrashError, Engine, ModelError, WrongKindError
from ramgguf.llama.logits_file import LogitsWriter
from ramgguf.llama.protocol import (
    Divergences,
    ModelInfo,
    Opened,
    Scored,
    decode_bits,
    decode_float32,
    encode_bits,
    encode_float32,
)
from ramgguf.llama.scorer import EngineOptions, EngineScorer, LogitsFiles, Scorer, Window

# Models that are compared with one reference share its decoding as long as all fit in this.
TOGETHER_BYTES = 8 * 10**9


@dataclass(frozen=True)
class Settings:
    """How models are scored together; stop_at_crash gives all of them up at the first crash."""

    protocol: EvalProtocol
    reference: ModelFile | None
    threads: int
    safe_kernels: bool
    stop_at_crash: bool
    verbose: bool
    logits: StoredLogits = NO_LOGITS

    @property
    def loaded_reference(self) -> ModelFile | None:
        """The reference that is a model, not a file of logits."""
        return None if self.logits.reference is not None else self.reference


@dataclass
class Run:
    """One model on its way to a result; blank is the result without sequences."""

    file: ModelFile
    blank: EvalResult | None = None
    id: str = ""
    failure: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.file.path)


def score(
    files: Sequence[ModelFile],
    settings: Settings,
    journal: Journal,
    progress: Progress,
    pool: WorkerPool | None = None,
) -> list[Run]:
    """Return the runs of the models; their sequences are in the journal.

    With a pool, its workers score the sequences.
    A model that fails leaves its run with a failure, and the others go on; with stop_at_crash a
    CrashError is raised instead. Raises WrongKindError when the reference is an embedding model.
    """
    runs = [Run(file) for file in files]
    stage = _Stage(settings, journal, progress, len(runs), pool)
    try:
        for group in groups(runs, settings.loaded_reference):
            stage.score_group(group)
        stage.finish(runs)
    finally:
        progress.finish()
    return runs


def groups(runs: Sequence[Run], reference: ModelFile | None) -> list[list[Run]]:
    """Return runs that are scored in one engine: with a reference, as many as fit together."""
    if reference is None:
        return [[run] for run in runs]
    found: list[list[Run]] = []
    room = 0
    for run in runs:
        if not found or run.file.n_bytes > room:
            found.append([])
            room = TOGETHER_BYTES - reference.n_bytes
        found[-1].append(run)
        room -= run.file.n_bytes
    return found


class _Stage:
    """Scores one group of runs after the other."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        progress: Progress,
        n_models: int,
        pool: WorkerPool | None,
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._progress = progress
        self._n_models = n_models
        self._pool = pool
        self._windows: dict[tuple[str, bool, tuple[int, ...]], Windows] = {}
        self._corpus = settings.protocol.corpus
        self._writer: LogitsWriter | None = None

    def score_group(self, group: list[Run]) -> None:
        """Score the group's models; one that fails is left out and the rest go on."""
        left = list(group)
        while left:
            loaded = self._loaded(left)
            try:
                with self._scorer(loaded) as scorer:
                    self._score(scorer, left, loaded)
                return
            except ModelError as e:
                failed = loaded[e.model]
                is_reference = failed == self._settings.reference
                if isinstance(e, WrongKindError) and e.kind == "embedding" and is_reference:
                    raise  # its copies have embeddings, which are compared in another way
                for run in left:
                    # Without its reference, no model can be scored as was asked.
                    if failed in (run.file, self._settings.reference):
                        run.failure = str(e)
                        if run.blank is not None:
                            self._journal.fail(run.id, str(e))
                if isinstance(e, CrashError) and self._settings.stop_at_crash:
                    raise
                left = [run for run in left if run.failure is None]

    def finish(self, runs: Sequence[Run]) -> None:
        """Give the file of saved logits its name.

        Raises EngineError where windows are missing; where runs failed, that joins their failures.
        """
        if self._writer is None:
            return
        try:
            self._writer.finish()
        except EngineError as e:
            failed = [run for run in runs if run.failure is not None]
            if not failed:
                raise
            for run in failed:
                run.failure = f"{run.failure}; {e}"

    def _loaded(self, group: list[Run]) -> list[ModelFile]:
        """Return the files that the engine loads: the reference first, and once."""
        reference = self._settings.loaded_reference
        if reference is None:
            return [run.file for run in group]
        return [reference, *(run.file for run in group if run.file != reference)]

    @contextmanager
    def _scorer(self, loaded: list[ModelFile]) -> Iterator[Scorer]:
        paths = [Path(file.path) for file in loaded]
        n_ctx = self._settings.protocol.sequence_length
        options = EngineOptions(
            n_ctx, self._settings.threads, self._settings.safe_kernels, self._settings.verbose
        )
        if self._pool is not None:
            yield RemoteScorer(self._pool, paths, options)
            return
        with Engine(
            paths,
            n_ctx=n_ctx,
            n_threads=options.n_threads,
            safe_kernels=options.safe_kernels,
            verbose=options.verbose,
        ) as engine:
            yield EngineScorer(engine)

    def _score(self, scorer: Scorer, group: list[Run], loaded: list[ModelFile]) -> None:
        windows = self._cut(scorer, Path(loaded[0].path))
        models = scorer.opened.models
        for number, info in enumerate(models):
            self._require_same_tokenizer(loaded[number], info, models[0])
        for run in group:
            if run.blank is None:
                info = models[loaded.index(run.file)]
                blank = self._blank(run, scorer.opened, info, windows)
                run.id, run.blank = self._journal.begin(blank)
                self._progress.advance(len(self._journal.done(run.id)))
        waiting = [w for w in windows.windows if self._missing(group, w) or self._unsaved(w)]
        has_reference = self._settings.loaded_reference is not None
        first_target = windows.protocol.first_target
        files = LogitsFiles(
            reference=self._settings.logits.reference_path,
            save=None if self._writer is None else str(self._writer.part),
        )
        for found in scorer.score(waiting, first_target, has_reference=has_reference, logits=files):
            for run in self._missing(group, found.window):
                number = loaded.index(run.file)
                scored = found.scored[number]
                if has_reference and number == 0:
                    scored = against_itself(scored)
                self._journal.add(self._record(run, found.window, scored, found.cpu))
                self._progress.advance(1)

    def _unsaved(self, window: Window) -> bool:
        return self._writer is not None and not self._writer.has(window.index)

    def _missing(self, group: list[Run], window: Window) -> list[Run]:
        """Return the runs that the window is not scored for."""
        return [run for run in group if window.index not in self._journal.done(run.id)]

    def _cut(self, scorer: Scorer, path: Path) -> Windows:
        """Return the sequences for the tokenizer of the first model, whose path this is."""
        protocol, vocab = self._settings.protocol, scorer.opened.models[0].vocab
        warm_up = _warm_up(scorer, path) if protocol.is_warm else ()
        key = vocab.sha256, vocab.adds_bos, warm_up
        if key not in self._windows:
            self._settings.logits.check(protocol, vocab.n_tokens)
            ids, ends = scorer.tokenize(
                protocol.text,
                add_special=protocol.add_special,
                control_tokens=protocol.corpus.has_control_tokens,
            )
            tokens = Tokens(ids, ends, vocab.bos, vocab.adds_bos, warm_up)
            first = not self._windows
            stored = self._settings.logits
            if stored.reference is not None:
                windows, self._corpus = stored.windows(protocol, tokens, scorer)
            else:
                windows = protocol.windows(tokens)
            self._windows[key] = windows
            if first and stored.save is not None:
                self._writer = stored.writer(windows.protocol, ids, vocab.n_tokens)
            if first:
                n = self._n_models * windows.protocol.n_seq
                self._progress.start("evaluate", n, "sequences")
        return self._windows[key]

    def _require_same_tokenizer(self, file: ModelFile, info: ModelInfo, first: ModelInfo) -> None:
        reference = self._settings.loaded_reference
        if reference is not None and info.vocab.sha256 != first.vocab.sha256:
            raise EngineError(
                f"{file.path}: its tokenizer ({info.vocab.n_tokens} tokens) is not the reference's "
                f"({first.vocab.n_tokens} tokens of {reference.path}); "
                "only models with the same tokens can be compared token by token"
            )
        takes_bos = self._settings.protocol.add_special
        if reference is not None and takes_bos and info.vocab.adds_bos != first.vocab.adds_bos:
            with_bos, without = ("it", "the reference")
            if first.vocab.adds_bos:
                with_bos, without = without, with_bos
            raise EngineError(
                f"{file.path} against {reference.path}: {with_bos} puts BOS before a text and "
                f"{without} does not, so the protocol llama gives them different tokens; use the "
                "protocol ram, with --bos or without"
            )

    def _blank(self, run: Run, opened: Opened, info: ModelInfo, windows: Windows) -> EvalResult:
        protocol = windows.protocol
        notes = windows.notes
        if said := note_of(self._corpus):
            notes += (said,)
        if protocol.n_ctx > info.n_ctx_train:
            notes += (f"sequences of {protocol.n_ctx}, but trained on {info.n_ctx_train} tokens",)
        return EvalResult(
            ramgguf_version=__version__,
            model=run.file,
            reference=self._settings.reference,
            protocol=protocol,
            text=self._corpus.identity,
            tokenizer_sha256=info.vocab.sha256,
            token_ids_sha256=sha256_int32(np.concatenate([w.ids for w in windows.windows])),
            engine=EngineSettings.of(
                opened, self._settings.threads, safe_kernels=self._settings.safe_kernels
            ),
            sequences=(),
            notes=notes,
        )

    def _record(self, run: Run, window: Window, scored: Scored, cpu: str) -> SequenceRecord:
        corpus = self._corpus
        title = corpus.title_at((window.text_start + window.text_end) // 2)
        broken = found = None
        if scored.n_broken:
            broken = BrokenSequence(
                index=window.index,
                title=title,
                n_broken=scored.n_broken,
                first_broken=scored.first_broken,
                in_model=scored.in_model,
                in_reference=scored.in_reference,
            )
        else:
            found = SequenceScore(
                index=window.index,
                title=title,
                text_start=window.text_start,
                text_end=window.text_end,
                excerpt=corpus.excerpt(window.text_start, window.text_end),
                n_scored=scored.n_scored,
                nll_sum=scored.nll_sum,
                token_nll=scored.token_nll,
                **({} if scored.divergences is None else dict(scored.divergences)),
                **token_groups(corpus.bytes, window, scored),
            )
        return SequenceRecord(
            run=run.id,
            index=window.index,
            score=found,
            broken=broken,
            seconds=scored.seconds,
            decode_seconds=scored.decode_seconds,
            cpu=None if run.blank is None or run.blank.engine.cpu == cpu else cpu,
        )


def _warm_up(scorer: Scorer, path: Path) -> tuple[int, ...]:
    """Return the tokens that the first model, in the file at path, reads before a text.

    BOS where the tokenizer adds it, else the start of the chat template, else BOS where the
    vocabulary has one.
    """
    vocab = scorer.opened.models[0].vocab
    if not vocab.adds_bos:
        with open_gguf(path) as file:
            start = chat_start(file)
        if start:
            ids, _ = scorer.tokenize(start, add_special=False, control_tokens=True)
            return tuple(int(i) for i in ids)
    return (vocab.bos,) if vocab.bos >= 0 else ()


def against_itself(scored: Scored) -> Scored:
    """Return a reference's own scores with what a comparison with itself gives: no divergence."""
    if scored.n_broken:
        return scored
    none = Divergences(
        reference_nll_sum=scored.nll_sum,
        kld_sum=0.0,
        kld_max=0.0,
        n_same_top=scored.n_scored,
        delta_p_sum=0.0,
        delta_p_squared_sum=0.0,
        token_kld=encode_float32(np.zeros(scored.n_scored)),
        token_same_top=encode_bits(np.ones(scored.n_scored)),
        token_reference_nll=scored.token_nll,
    )
    return scored.model_copy(update={"divergences": none})


def token_groups(text: bytes, window: Window, scored: Scored) -> dict[str, Any]:
    """Return a sequence's sums by position and class, and its worst tokens; nothing without KLD.

    text is what the window's ends refer to.
    """
    against = scored.divergences
    if against is None:
        return {}
    n = scored.n_scored
    starts = np.concatenate([[window.text_start], window.ends[:-1]])
    positions = np.arange(len(window.ends))[-n:]
    figures = TokenFigures(
        positions=positions,
        texts=[text[starts[i] : window.ends[i]] for i in positions],
        kld=decode_float32(against.token_kld).astype(np.float64),
        same_top=decode_bits(against.token_same_top, n),
        nll=decode_float32(scored.token_nll).astype(np.float64),
        reference_nll=decode_float32(against.token_reference_nll).astype(np.float64),
    )
    return {
        "by_position": figures.by_position(),
        "by_class": figures.by_class(),
        "worst_tokens": figures.worst(),
    }
