"""The Python interface to sensitivities: one function, from a model's file to a Sensitivity."""

from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from ramgguf.errors import ImatrixError, PlanError
from ramgguf.gguf_io import open_gguf
from ramgguf.hub import local_path
from ramgguf.imatrix import Imatrix, load_imatrix
from ramgguf.probe_tokens import N_CTX, Request, parse_tokens
from ramgguf.progress import Progress, Silent
from ramgguf.schema import Encoder
from ramgguf.sensitivities import Sensitivity
from ramgguf.stages import sensitivity as _sensitivity
from ramgguf.stages.reweigh import reweighed
from ramgguf.work.opening import opened

DEFAULT_SECONDS = 1200.0


def sensitivity(
    model: str | Path,
    *,
    tokens: str = "self",
    encoder: Encoder = "search",
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    n_sequences: int | None = None,
    n_ctx: int = N_CTX,
    seed: int = 0,
    seconds: float = DEFAULT_SECONDS,
    journal: str | Path | None = None,
    folder: str | Path | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Return how much the error of each of the model's tensors changes its output.

    encoder, imatrix and hessian are those that the model will be quantized with, as in quantize.
    tokens is self (drawn from the model), random, wikitext, or a text file, in sequences of n_ctx.
    n_sequences None takes as many, up to four, as fit the seconds; with a number, all tensors are
    measured and two runs agree exactly. journal keeps every reading, and a run that was killed goes
    on from it; folder takes a copy of the model meanwhile, by default the system's temporary
    folder. announce is told what is going to be done, and for how long.

    With an executor, the passes run on its workers (docs/scale.md), with `threads` threads each;
    folder is then theirs. Equal kernels and threads give equal numbers.

    Raises GGUFError, ImatrixError, PlanError for a model or journal that does not suit,
    EngineError when llama.cpp is missing or fails.
    """
    kind, corpus = parse_tokens(tokens)
    request = Request(
        encoder=encoder,
        tokens=kind,
        corpus=corpus,
        n_sequences=n_sequences,
        n_ctx=n_ctx,
        seed=seed,
        seconds=seconds,
        imatrix=weighed_by(imatrix, hessian, encoder),
    )
    with opened(
        model, request, folder=folder, journal=journal, threads=threads, executor=executor
    ) as at:
        return _sensitivity.sensitivity(
            at.file,
            request,
            at.opening,
            journal_path=at.journal,
            progress=progress or Silent(),
            announce=announce,
        )


def reweigh(
    sensitivity: Sensitivity | str | Path,
    model: str | Path,
    imatrix: str | Path | None,
    *,
    hessian: str | Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Return sensitivities per unit of the error that the importance matrix weighs, unmeasured.

    The readings' quantizations are made again and their errors weighed anew; no model is run.
    Raises PlanError when the sensitivity is of another model.
    """
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = Sensitivity.load(Path(sensitivity))
    with open_gguf(local_path(model), kind_check=True) as file:
        return reweighed(file, sensitivity, weighed_by(imatrix, hessian), progress or Silent())


def weighed_by(
    imatrix: str | Path | None, hessian: str | Path | None = None, encoder: Encoder = "search"
) -> Imatrix | None:
    """Return the importance matrix of the file with the Hessians of the other, None without.

    Raises PlanError when the encoder needs Hessians, ImatrixError when they stand alone.
    """
    if encoder == "gptq" and hessian is None:
        raise PlanError("the encoder gptq needs Hessians; make them with calibrate --hessian")
    if imatrix is None:
        if hessian is not None:
            raise ImatrixError("Hessians need the importance matrix that was made with them")
        return None
    return load_imatrix(Path(imatrix), Path(hessian) if hessian is not None else None)
