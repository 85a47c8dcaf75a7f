"""Score models on a text: sequences from the corpus, numbers from the engine, results on disk."""

import itertools
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ramgguf.cluster.worker_pool import WorkerPool
from ramgguf.core.corpus import dataset as dataset_corpus
from ramgguf.core.corpus import default_corpus, text_file
from ramgguf.core.drawing import Drawn
from ramgguf.core.errors import EngineError
from ramgguf.core.files import require_distinct
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.wikitext import is_canonical
from ramgguf.evaluate.common_sequences import why_missing
from ramgguf.evaluate.corpora import ScoredText, refuse_equal, scored_texts
from ramgguf.evaluate.embedding_result import EmbeddingResult
from ramgguf.evaluate.embeddings import EmbeddingSettings, embed_models
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.protocol import EvalProtocol, ProtocolName
from ramgguf.evaluate.result import EvalResult, ModelFile
from ramgguf.evaluate.scoring import Run, Settings, score
from ramgguf.evaluate.stored_logits import NO_LOGITS, StoredLogits, identify_logits
from ramgguf.gguf.hub import local_path, origin_of
from ramgguf.gguf.reader import open_gguf, require_loadable
from ramgguf.llama.client import CrashError, WrongKindError
from ramgguf.llama.logits_file import LogitsFile


@dataclass(frozen=True)
class Evaluation(Drawn):
    """Results in the order of the models, and what went wrong, one message per failed model.

    A model that failed midway, or gave NaN or infinite logits in every sequence, has a result with
    its finished sequences; one that did not load has none. Of embedding models, whose reference is
    one, there are embeddings instead of results.
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
    logits: StoredLogits = NO_LOGITS,
) -> Evaluation:
    """Return the models' results in their order, each compared with the reference if there is one.

    A model that crashes llama.cpp ends with what it had and a failure; the others go on. jsonl
    takes every sequence as it finishes; with resume, what it has is not computed again.
    safe_kernels None means: when llama.cpp crashes with its repacked kernels, all models are scored
    again without them, and the results say so. With an executor, its workers score. Where the
    reference is an embedding model, embeddings are compared. logits has the reference's file of
    logits, or takes the reference's (the model's, without one). Raises EngineError when nothing
    could be scored, GGUFError for files that are no models.
    """
    if not models:
        raise EngineError("there is no model to score")
    against = None if reference is None else identify(reference)
    if logits.reference is not None:
        if reference is not None:
            raise EngineError("a reference is a model or a file of logits, not both")
        against = identify_logits(logits.reference)
        protocol = protocol or EvalProtocol(protocol="llama")
        logits.check(protocol)
        protocol = replace(protocol, n_ctx=protocol.n_ctx or logits.reference.layout.n_ctx)
    if logits.save is not None and reference is None and len(models) > 1:
        raise EngineError("logits are saved of one model: give one, or a reference")
    settings = Settings(
        protocol or EvalProtocol(),
        against,
        threads,
        safe_kernels=bool(safe_kernels),
        stop_at_crash=safe_kernels is None,
        verbose=verbose,
        logits=replace(logits, resume=resume),
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
            settings = replace(
                settings,
                safe_kernels=True,
                stop_at_crash=False,
                logits=replace(logits, resume=False),  # those of other kernels are no use
            )
            runs = score(files, settings, journal, shown, pool)
        results = [_result(run, journal, note) for run in runs]
    said = [run.failure for run in runs if run.failure is not None]
    said += [
        f"{r.model.path}: no sequence was scored ({why_missing(r)})"
        for r in results
        if r is not None and r.broken and not r.sequences and r.failure is None
    ]
    failures = tuple(dict.fromkeys(said))
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
    reference_logits: str | Path | None = None,
    save_logits: str | Path | None = None,
    protocol: ProtocolName | None = None,
    n_ctx: int | Sequence[int] | None = None,
    n_seq: int | None = None,
    seed: int = 42,
    bos: bool = False,
    corpus: Sequence[str] = (),
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
    split) is given; corpus names several (prose, code, math, chat, multilingual, long, wikitext, or
    files), each of which has a result per model, as has each of several n_ctx. wiki.test.raw has
    the protocol llama by default, those of corpus have warm, all others ram.

    With a reference, KLD and the like are measured against it. reference_logits is a file of
    llama-perplexity's --kl-divergence-base in its place, save_logits one that is written of the
    reference, or of the model where there is none; both have the protocol llama.

    Raises EngineError when nothing could be scored; a model that fails midway leaves its finished
    sequences. Where llama.cpp's repacked kernels crash (safe_kernels None), all models are scored
    without them. With an executor, its workers score the sequences (docs/scale.md), with `threads`
    threads each.

    Where the reference is an embedding model, the embeddings of n_seq lines of the text, of at most
    n_ctx tokens each, are compared with its own (docs/evaluation.md): the result has embeddings.
    """
    has_files = reference_logits is not None or save_logits is not None
    paths = [local_path(m) for m in models]
    against = local_path(reference) if reference is not None else None
    if sum((text is not None, dataset is not None, bool(corpus))) > 1:
        raise EngineError("a text, a dataset or corpora can be scored, not several of these")
    if not paths:
        raise EngineError("there is no model to score")
    texts: tuple[ScoredText, ...] = (ScoredText(default_corpus()),)
    if corpus:
        texts = scored_texts(corpus, against or paths[0])
    elif text is not None:
        texts = (ScoredText(text_file(Path(text))),)
    elif dataset is not None:
        texts = (ScoredText(dataset_corpus(dataset, split=split)),)
    lengths = (n_ctx,) if n_ctx is None or isinstance(n_ctx, int) else (tuple(n_ctx) or (None,))
    refuse_equal(texts, lengths)
    if has_files and len(texts) * len(lengths) > 1:
        raise EngineError("a file of logits is of one text and one length of sequences")
    as_llama = has_files or all(is_canonical(t.corpus) for t in texts)
    protocol = protocol or ("llama" if as_llama else "warm" if corpus else "ram")
    if has_files and protocol != "llama":
        raise EngineError(
            f"files of logits hold the windows of the protocol llama, not of {protocol}"
        )
    logits = StoredLogits(
        reference=LogitsFile(Path(reference_logits)) if reference_logits is not None else None,
        save=Path(save_logits) if save_logits is not None else None,
        has_text=text is not None or dataset is not None,
    )
    journal = Path(jsonl) if jsonl is not None else None
    require_distinct(journal, logits.save, error=EngineError)
    parts: list[Evaluation] = []
    for each, length in itertools.product(texts, lengths):
        found = score_models(
            paths,
            reference=against,
            protocol=EvalProtocol(
                each.corpus, protocol, n_ctx=length or each.n_ctx, n_seq=n_seq, seed=seed, bos=bos
            ),
            threads=threads or default_threads(),
            safe_kernels=safe_kernels,
            verbose=verbose,
            jsonl=journal,
            resume=resume or bool(parts),  # one file takes all
            executor=executor,
            progress=progress,
            logits=logits,
        )
        parts.append(found)
    return Evaluation(
        tuple(r for part in parts for r in part.results),
        tuple(dict.fromkeys(f for part in parts for f in part.failures)),
        tuple(e for part in parts for e in part.embeddings),
    )
