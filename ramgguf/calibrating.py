"""The Python interface to what surrounds quantization: importance matrices, and controls."""

from collections.abc import Callable
from pathlib import Path

from ramgguf.gguf_io import open_gguf
from ramgguf.hub import local_path
from ramgguf.parallel import default_threads
from ramgguf.probe_tokens import N_CTX, Request, parse_tokens
from ramgguf.progress import Progress, Silent
from ramgguf.schema import Plan
from ramgguf.stages import calibrate as _calibrate
from ramgguf.stages import perturb as _perturb
from ramgguf.stages.calibrate import Calibration, Outputs
from ramgguf.stages.quantize import check_source


def calibrate(
    model: str | Path,
    output: str | Path,
    *,
    tokens: str = "self",
    n_sequences: int = _calibrate.N_SEQUENCES,
    n_ctx: int = N_CTX,
    seed: int = 0,
    hessian: str | Path | None = None,
    hessian_pattern: str = ".",
    max_gram_bytes: int = _calibrate.MAX_GRAM_BYTES,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Write the model's importance matrix (llama.cpp's GGUF format) and return what was written.

    tokens is self (drawn from the model), random, wikitext, or a text file; n_sequences of n_ctx
    are read. hessian also takes XᵀX of the inputs of the weights whose name hessian_pattern finds.
    announce is told the cost once it is known.

    Raises GGUFError, ImatrixError for outputs that cannot be written, EngineError when llama.cpp is
    missing or fails.
    """
    kind, corpus = parse_tokens(tokens)
    request = Request(
        encoder="rtn",
        tokens=kind,
        corpus=corpus,
        n_sequences=n_sequences,
        n_ctx=n_ctx,
        seed=seed,
    )
    outputs = Outputs(
        Path(output),
        Path(hessian) if hessian is not None else None,
        hessian_pattern,
        max_gram_bytes,
        force,
    )
    with open_gguf(local_path(model), kind_check=True) as file:
        return _calibrate.calibrate(
            file,
            request,
            outputs,
            threads=threads or default_threads(),
            progress=progress or Silent(),
            announce=announce,
        )


def perturb(
    model: str | Path,
    like: Plan | str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model with Gaussian noise as large as a plan's quantization errors, row by row.

    Tensors with noise are in F32. Raises PlanError when the plan is another model's, GGUFError when
    the output cannot be written.
    """
    plan = like if isinstance(like, Plan) else Plan.load(Path(like))
    with open_gguf(local_path(model), kind_check=True) as file:
        check_source(file, plan)
        return _perturb.perturb(
            file,
            plan,
            Path(output),
            seed=seed,
            force=force,
            threads=threads or default_threads(),
            progress=progress or Silent(),
        )
