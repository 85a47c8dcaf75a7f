"""Score models on a text: sequences from the corpus, numbers from the engine, results on disk."""

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ramgguf.cluster.worker_pool import WorkerPool
from ramgguf.core.corpus import dataset as dataset_corpus
from ramgguf.core.corpus import default_corpus, text_file
from ramgguf.core.drawing import Drawn
from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.embeddings import EmbeddingSettings, embed_models
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.evaluate.result import EvalResult, ModelFile
from ramgguf.evaluate.scoring import Run, Settings, score
from ramgguf.gguf.hub import local_path, origin_of
from ramgguf.gguf.reader import open_gguf, require_loadable
from ramgguf.llama.client import CrashError, WrongKindError


@dataclass(frozen=True)
class Evaluation(Drawn):
    """Results in the order of the models, and what went wrong, one message per failed model.

    A model that failed midway has a result with its finished sequences; one that did not load has
    none. Of embedding models, whose reference is one, there are embeddings instead of results.
    """

    results: tuple[EvalResult, ...]
    failures: tuple[str, ...]
    embeddings: tuple[EmbeddingResult, ...] = ()


def score_models(
    models: Sequence[Path],
    *,
    reference: Path | None = None,
    protocol: EvalProtocol | None = None,
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
    again without them, and the results say so. With an executor, its workers score. Where the
    reference is an embedding model, embeddings are compared. Raises EngineError when nothing could
    be scored, GGUFError for files that are no models.
    """
    if not models:
        raise EngineError("there is no model to score")
    settings = Settings(
        protocol or EvalProtocol(),
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
        pool = None if executor is None else stack.enter_context(WorkerPool(executor))
        try:
            runs = score(files, settings, journal, shown, pool)
        except WrongKindError as e:
            if pool is not None:
                raise EngineError(
                    f"{e}; embedding models are compared in this process: leave out the executor"
                ) from None
            return _embedded(files, settings, safe_kernels, journal, shown)
        except CrashError as e:
            note = f"scored without llama.cpp's repacked kernels, because: {e}"
            settings = replace(settings, safe_kernels=True, stop_at_crash=False)
            runs = score(files, settings, journal, shown, pool)
        results = [_result(run, journal, note) for run in runs]
    failures = tuple(dict.fromkeys(run.failure for run in runs if run.failure is not None))
    if not any(r is not None and (r.sequences or r.broken) for r in results):
        raise EngineError("; ".join(failures))
    return Evaluation(tuple(r for r in results if r is not None), failures)


def _embedded(
    files: Sequence[ModelFile],
    settings: Settings,
    safe_kernels: bool | None,
    journal: Journal,
    progress: Progress,
) -> Evaluation:
    assert settings.reference is not None  # by which this was called for
    how = EmbeddingSettings(
        settings.protocol, settings.reference, settings.threads, safe_kernels, settings.verbose
    )
    found, failures = embed_models(files, how, journal, progress)
    if not found:
        raise EngineError("; ".join(failures))
    return Evaluation((), failures, found)


def identify(path: Path) -> ModelFile:
    """Return which file a model is. Raises GGUFError when it is none."""
    with open_gguf(path) as gguf:
        require_loadable(gguf)
        return ModelFile(
            path=str(path),
            n_bytes=gguf.n_bytes,
            header_sha256=gguf.header_sha256,
            sample_sha256=gguf.sample_sha256,
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


def evaluate(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    protocol: Literal["ram", "llama"] = "ram",
    n_ctx: int | None = None,
    n_seq: int | None = None,
    seed: int = 42,
    bos: bool = False,
    text: str | Path | None = None,
    dataset: str | None = None,
    split: str = "test",
    safe_kernels: bool | None = None,
    jsonl: str | Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    verbose: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the scores of models on a text, by llama.cpp, sequence by sequence.

    The text is the WikiText-2 test split unless text (a file) or dataset (a name on the hub, with
    split) is given. With a reference, KLD and the like are measured against it. Raises EngineError
    when nothing could be scored; a model that fails midway leaves its finished sequences. Where
    llama.cpp's repacked kernels crash (safe_kernels None), all models are scored without them.
    With an executor, its workers score the sequences (docs/scale.md), with `threads` threads each.

    Where the reference is an embedding model, the embeddings of n_seq lines of the text, of at most
    n_ctx tokens each, are compared with its own (docs/evaluation.md): the result has embeddings.
    """
    if text is not None and dataset is not None:
        raise EngineError("either a text or a dataset can be scored, not both")
    corpus = default_corpus()
    if text is not None:
        corpus = text_file(Path(text))
    elif dataset is not None:
        corpus = dataset_corpus(dataset, split=split)
    return score_models(
        [local_path(m) for m in models],
        reference=local_path(reference) if reference is not None else None,
        protocol=EvalProtocol(corpus, protocol, n_ctx=n_ctx, n_seq=n_seq, seed=seed, bos=bos),
        threads=threads or default_threads(),
        safe_kernels=safe_kernels,
        verbose=verbose,
        jsonl=Path(jsonl) if jsonl is not None else None,
        resume=resume,
        executor=executor,
        progress=progress,
    )
