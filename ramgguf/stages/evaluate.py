"""Score models on a text: sequences from the corpus, numbers from the engine, results on disk."""

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ramgguf.corpus import Recipe
from ramgguf.documents import Drawn
from ramgguf.engine.client import CrashError
from ramgguf.errors import EngineError
from ramgguf.gguf_io import open_gguf
from ramgguf.hub import origin_of
from ramgguf.journal import Journal
from ramgguf.progress import Progress, Silent
from ramgguf.results import EvalResult, ModelFile
from ramgguf.stages.scoring import Run, Settings, score
from ramgguf.work.crew import Crew


@dataclass(frozen=True)
class Evaluation(Drawn):
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
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the models' results in their order, each compared with the reference if there is one.

    A model that crashes llama.cpp ends with what it had and a failure; the others go on. jsonl
    takes every sequence as it finishes; with resume, what it has is not computed again.
    safe_kernels None means: when llama.cpp crashes with its repacked kernels, all models are scored
    again without them, and the results say so. With an executor, its workers score. Raises
    EngineError when nothing could be scored, GGUFError for files that are no models.
    """
    if not models:
        raise EngineError("there is no model to score")
    settings = Settings(
        recipe or Recipe(),
        None if reference is None else identify(reference),
        threads,
        safe_kernels=bool(safe_kernels),
        stop_at_crash=safe_kernels is None,
        verbose=verbose,
    )
    files = [identify(path) for path in models]
    shown = progress or Silent()
    note = None
    with Journal(jsonl, resume=resume) as journal, ExitStack() as stack:
        crew = None if executor is None else stack.enter_context(Crew(executor))
        try:
            runs = score(files, settings, journal, shown, crew)
        except CrashError as e:
            note = f"scored without llama.cpp's repacked kernels, because: {e}"
            settings = replace(settings, safe_kernels=True, stop_at_crash=False)
            runs = score(files, settings, journal, shown, crew)
        results = [_result(run, journal, note) for run in runs]
    failures = tuple(dict.fromkeys(run.failure for run in runs if run.failure is not None))
    if not any(r is not None and (r.sequences or r.broken) for r in results):
        raise EngineError("; ".join(failures))
    return Evaluation(tuple(r for r in results if r is not None), failures)


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
            hub=origin_of(gguf.paths[0]),
        )


def _file_type_name(number: int | None) -> str:
    from gguf import LlamaFileType

    try:
        name = str(LlamaFileType(number).name)
    except ValueError:
        return "unknown" if number is None else str(number)
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _result(run: Run, journal: Journal, note: str | None) -> EvalResult | None:
    """Return the run's result; None for a model that never loaded."""
    if run.blank is None:
        return None
    notes = run.blank.notes + ((note,) if note else ())
    update = {"failure": run.failure, "notes": notes}
    return journal.result(run.id).model_copy(update=update)
