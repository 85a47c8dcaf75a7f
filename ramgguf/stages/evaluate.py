"""Score models on a text: sequences from the corpus, numbers from the engine, results on disk."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ramgguf.corpus import Recipe, Tokens, Window, Windows
from ramgguf.engine.client import CrashError, Engine, ModelError
from ramgguf.engine.wire import ModelInfo, Opened, Scored
from ramgguf.errors import EngineError
from ramgguf.gguf_io import open_gguf
from ramgguf.journal import Journal, SequenceRecord, run_id
from ramgguf.progress import Progress, Silent
from ramgguf.results import (
    BrokenSequence,
    EngineSettings,
    EvalResult,
    ModelFile,
    SequenceScore,
    sha256_int32,
)
from ramgguf.version import __version__

# Models that are compared with one reference share its decoding as long as all fit in this.
TOGETHER_BYTES = 8 * 10**9


@dataclass(frozen=True)
class Evaluation:
    """Results in the order of the models, and what went wrong, one message per failed model.

    A model that failed midway has a result with its finished sequences; one that did not load has
    none.
    """

    results: tuple[EvalResult, ...]
    failures: tuple[str, ...]


def evaluate(
    models: Sequence[Path],
    *,
    reference: Path | None = None,
    recipe: Recipe | None = None,
    threads: int,
    safe_kernels: bool | None = None,
    verbose: bool = False,
    jsonl: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the models' results in their order, each compared with the reference if there is one.

    A model that crashes llama.cpp ends with what it had and a failure; the others go on. jsonl
    takes every sequence as it finishes; with resume, what it has is not computed again.
    safe_kernels None means: when llama.cpp crashes with its repacked kernels, all models are scored
    again without them, and the results say so. Raises EngineError when nothing could be scored,
    GGUFError for files that are no models.
    """
    if not models:
        raise EngineError("there is no model to score")
    against = None if reference is None else identify(reference)
    how = _How(recipe or Recipe(), against, threads, bool(safe_kernels), verbose)
    shown = progress or Silent()
    with Journal(jsonl, resume=resume) as journal:
        runs = _scored(models, how, journal, shown)
        crashes = [run.failure for run in runs if run.crashed and run.failure is not None]
        if crashes and safe_kernels is None:
            note = f"scored without llama.cpp's repacked kernels, because: {crashes[0]}"
            runs = _scored(models, replace(how, safe_kernels=True), journal, shown, note)
        results = [_result(run, journal) for run in runs]
    failures = tuple(dict.fromkeys(run.failure for run in runs if run.failure is not None))
    if not any(r is not None and (r.sequences or r.broken) for r in results):
        raise EngineError("\n".join(failures))
    return Evaluation(tuple(r for r in results if r is not None), failures)


def _scored(
    models: Sequence[Path],
    how: "_How",
    journal: Journal,
    progress: Progress,
    note: str | None = None,
) -> "list[_Run]":
    runs = [_Run(path, identify(path), note=note) for path in models]
    stage = _Stage(how, journal, progress, len(runs))
    try:
        for group in _groups(runs, how.reference):
            stage.score_group(group)
    finally:
        progress.finish()
    return runs


@dataclass(frozen=True)
class _How:
    recipe: Recipe
    reference: ModelFile | None
    threads: int
    safe_kernels: bool
    verbose: bool


@dataclass
class _Run:
    """One model on its way to a result; blank is the result without sequences."""

    path: Path
    file: ModelFile
    blank: EvalResult | None = None
    failure: str | None = None
    crashed: bool = False
    note: str | None = None
    id: str = ""


def identify(path: Path) -> ModelFile:
    """Return which file a model is. Raises GGUFError when it is none."""
    with open_gguf(path) as gguf:
        return ModelFile(
            path=str(path),
            n_bytes=gguf.n_bytes,
            header_sha256=gguf.header_sha256,
            architecture=gguf.architecture,
            file_type=_file_type_name(gguf.metadata.integer("general.file_type")),
            name=gguf.name,
            n_weights=gguf.n_weights,
            plan_sha256=gguf.metadata.string("ramgguf.plan_sha256"),
        )


def _file_type_name(number: int | None) -> str:
    from gguf import LlamaFileType

    try:
        name = str(LlamaFileType(number).name)
    except ValueError:
        return "unknown" if number is None else str(number)
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _groups(runs: list[_Run], reference: ModelFile | None) -> list[list[_Run]]:
    """Return runs that are scored in one engine: with a reference, as many as fit together."""
    if reference is None:
        return [[run] for run in runs]
    groups: list[list[_Run]] = []
    room = 0
    for run in runs:
        if not groups or run.file.n_bytes > room:
            groups.append([])
            room = TOGETHER_BYTES - reference.n_bytes
        groups[-1].append(run)
        room -= run.file.n_bytes
    return groups


class _Stage:
    """Scores one group of runs after the other."""

    def __init__(self, how: _How, journal: Journal, progress: Progress, n_models: int) -> None:
        self._how = how
        self._n_references = 0 if how.reference is None else 1
        self._journal = journal
        self._progress = progress
        self._n_models = n_models
        self._windows: dict[str, Windows] = {}

    def score_group(self, group: list[_Run]) -> None:
        """Score the group's models; one that fails is left out and the rest go on."""
        left = list(group)
        while left:
            try:
                with self._engine(left) as engine:
                    self._score(engine, left)
                return
            except ModelError as e:
                number = e.model - self._n_references
                # Without its reference, no model of the group can be scored as was asked.
                for run in left if number < 0 else [left[number]]:
                    run.failure = str(e)
                    run.crashed = isinstance(e, CrashError)
                    if run.blank is not None:
                        self._journal.fail(run.id, str(e))
                left = [run for run in left if run.failure is None]

    def _engine(self, group: list[_Run]) -> Engine:
        reference = self._how.reference
        head = [] if reference is None else [Path(reference.path)]
        return Engine(
            head + [run.path for run in group],
            n_ctx=self._how.recipe.sequence_length,
            n_threads=self._how.threads,
            safe_kernels=self._how.safe_kernels,
            verbose=self._how.verbose,
        )

    def _score(self, engine: Engine, group: list[_Run]) -> None:
        windows = self._cut(engine)
        infos = engine.opened.models
        for run, info in zip(group, infos[self._n_references :], strict=True):
            self._require_same_tokenizer(run, info, infos[0])
            if run.blank is None:
                run.blank = self._blank(run, engine.opened, info, windows)
                run.id = run_id(run.blank)
                self._progress.advance(len(self._journal.done(run.id)))
            self._journal.announce(run.id, run.blank)
        for window in windows.windows:
            if all(window.index in self._journal.done(run.id) for run in group):
                continue
            self._score_window(engine, group, window, windows.protocol.first_target)

    def _score_window(
        self, engine: Engine, group: list[_Run], window: Window, first_target: int
    ) -> None:
        found = list(
            engine.score(
                window.index, window.ids, first_target, has_reference=bool(self._n_references)
            )
        )
        for run, scored in zip(group, found[self._n_references :], strict=True):
            if window.index not in self._journal.done(run.id):
                self._journal.add(self._record(run, window, scored))
                self._progress.advance(1)

    def _cut(self, engine: Engine) -> Windows:
        """Return the sequences for the tokenizer of the engine's first model."""
        recipe, vocab = self._how.recipe, engine.opened.models[0].vocab
        if vocab.sha256 not in self._windows:
            ids, ends = engine.tokenize(recipe.text, add_special=recipe.add_special)
            tokens = Tokens(ids, ends, vocab.bos, vocab.adds_bos)
            first = not self._windows
            windows = self._windows[vocab.sha256] = recipe.windows(tokens)
            if first:
                n = self._n_models * windows.protocol.n_seq
                self._progress.start("evaluate", n, "sequences")
        return self._windows[vocab.sha256]

    def _require_same_tokenizer(self, run: _Run, info: ModelInfo, first: ModelInfo) -> None:
        if info.vocab.sha256 == first.vocab.sha256:
            return
        reference = self._how.reference
        raise EngineError(
            f"{run.path}: its tokenizer ({info.vocab.n_tokens} tokens) is not the reference's "
            f"({first.vocab.n_tokens} tokens of {reference.path if reference else run.path}); "
            "only models with the same tokens can be compared token by token"
        )

    def _blank(self, run: _Run, opened: Opened, info: ModelInfo, windows: Windows) -> EvalResult:
        recipe, protocol = self._how.recipe, windows.protocol
        notes = windows.notes
        if protocol.n_ctx > info.n_ctx_train:
            notes += (f"sequences of {protocol.n_ctx}, but trained on {info.n_ctx_train} tokens",)
        return EvalResult(
            ramgguf_version=__version__,
            model=run.file,
            reference=self._how.reference,
            protocol=protocol,
            text=recipe.corpus.identity,
            tokenizer_sha256=info.vocab.sha256,
            token_ids_sha256=sha256_int32(np.concatenate([w.ids for w in windows.windows])),
            engine=EngineSettings(
                llama_cpp_python=opened.system.llama_cpp_python,
                llama_cpp_build=opened.system.build,
                system_info=opened.system.system_info,
                cpu=cpu_name(),
                n_threads=self._how.threads,
                n_batch=opened.n_batch,
                safe_kernels=self._how.safe_kernels,
            ),
            sequences=(),
            notes=notes,
        )

    def _record(self, run: _Run, window: Window, scored: Scored) -> SequenceRecord:
        corpus = self._how.recipe.corpus
        title = corpus.title_at((window.text_start + window.text_end) // 2)
        broken = score = None
        if scored.n_broken:
            broken = BrokenSequence(
                index=window.index,
                title=title,
                n_broken=scored.n_broken,
                first_broken=scored.first_broken,
            )
        else:
            score = SequenceScore(
                index=window.index,
                title=title,
                text_start=window.text_start,
                text_end=window.text_end,
                excerpt=corpus.excerpt(window.text_start, window.text_end),
                n_scored=scored.n_scored,
                nll_sum=scored.nll_sum,
                token_nll=scored.token_nll,
                **({} if scored.divergences is None else dict(scored.divergences)),
            )
        return SequenceRecord(
            run=run.id,
            index=window.index,
            score=score,
            broken=broken,
            seconds=scored.seconds,
            decode_seconds=scored.decode_seconds,
        )


def _result(run: _Run, journal: Journal) -> EvalResult | None:
    """Return the run's result; None for a model that never loaded."""
    if run.blank is None:
        return None
    notes = run.blank.notes + ((run.note,) if run.note else ())
    update = {"failure": run.failure, "notes": notes}
    return journal.result(run.id).model_copy(update=update)


def cpu_name() -> str:
    """Return the CPU's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
