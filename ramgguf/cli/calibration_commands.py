"""The commands around quantization: calibrate, transform, and the control perturb."""

from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.calibrate import N_SEQUENCES
from ramgguf.cli import options as opt
from ramgguf.core.escape import to_json
from ramgguf.core.units import format_bytes, format_count, parse_size
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem
from ramgguf.llama.tokens import N_CTX
from ramgguf.report.calibration import print_calibration, summary
from ramgguf.transform import STRENGTH


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "calibrate",
        epilog="Example: ramgguf calibrate model-f16.gguf -o model.imatrix.gguf",
    )(calibrate)
    app.command(
        "transform",
        epilog="Example: ramgguf transform model-f16.gguf --imatrix I.gguf -o model.scales.gguf",
    )(transform)
    app.command(
        "perturb",
        epilog="Example: ramgguf perturb model-f16.gguf --like plan.json -o noisy.gguf --seed 1",
    )(perturb)


def calibrate(
    model: opt.Model,
    output: opt.Output = None,
    tokens: opt.TokenSources = "mix",
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="How many sequences are read.")
    ] = N_SEQUENCES,
    context: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of each sequence.")
    ] = N_CTX,
    seed: opt.TokenSeed = 0,
    hessian: Annotated[
        Path | None,
        typer.Option("--hessian", help="Also write XᵀX of the inputs here, for --encoder gptq."),
    ] = None,
    hessian_tensors: Annotated[
        str | None,
        typer.Option("--hessian-tensors", help="Only of weights whose name this regex finds."),
    ] = None,
    hessian_memory: Annotated[
        str | None,
        typer.Option(
            "--hessian-memory", help="Read the tokens in batches that take this; default: 4GiB."
        ),
    ] = None,
    stand_in: opt.StandInOption = "auto",
    scratch: opt.Scratch = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure how much each input column counts: an importance matrix in llama.cpp's format.

    The texts come with the package; --tokens self lets the model draw its own. llama-quantize takes
    the file, too.
    """
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    if hessian is None:
        given = {"--hessian-tensors": hessian_tensors, "--hessian-memory": hessian_memory}
        idle = [name for name, value in given.items() if value is not None]
        opt.refuse_idle(idle, "only with --hessian")
    found = api.calibrate(
        terminal.fetched(model),
        output or beside(model, f"{model_stem(model)}.imatrix.gguf"),
        tokens=tokens,
        n_sequences=sequences,
        n_ctx=context,
        seed=seed,
        hessian=hessian,
        hessian_pattern=hessian_tensors or ".",
        max_gram_bytes=parse_size(hessian_memory or "4GiB"),
        stand_in=opt.stand_in(stand_in),
        folder=scratch,
        force=force,
        threads=threads,
        progress=terminal.progress,
        announce=terminal.announce,
    )
    if as_json:
        print(to_json(summary(found)))
    else:
        print_calibration(found, terminal.out)


def transform(
    model: opt.Model,
    imatrix: Annotated[Path, typer.Option("--imatrix", help="The importance matrix of the model.")],
    output: opt.Output = None,
    strength: Annotated[
        float, typer.Option("--strength", help="Exponent of the inputs' mean squares.")
    ] = STRENGTH,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Run the scaled model to see that it computes the same."
        ),
    ] = True,
    force: opt.Force = False,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Choose column scales: blocks round better, and the model computes the same.

    `quantize --scales` takes the file. Norms, up and V are divided by what the columns of the
    weights after them are multiplied with, so that nothing is added to the output.
    """
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    found = api.transform(
        terminal.fetched(model),
        output or beside(model, f"{model_stem(model)}.scales.gguf"),
        imatrix,
        strength=strength,
        check=check,
        force=force,
        threads=threads,
        progress=terminal.progress,
        announce=terminal.announce,
    )
    if as_json:
        print(to_json({**vars(found), "path": str(found.path)}))
        return
    said = "" if found.kld is None else f"; the scaled model has KLD {found.kld:.2g} to the model"
    terminal.out.print(
        f"{found.path}: scales of {format_count(found.n_tensors, 'tensor')} at "
        f"{format_count(found.n_folds, 'place')}{said}",
        soft_wrap=True,
    )


def perturb(
    model: opt.Model,
    like: Annotated[
        Path, typer.Option("--like", metavar="PLAN", help="The plan whose errors are imitated.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    force: opt.Force = False,
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
) -> None:
    """Write the model with Gaussian noise as large as a plan's quantization errors.

    A control: where a quantized model scores differently, the size of its errors is not the cause.
    """
    terminal = opt.Terminal.make(quiet=quiet, as_json=False)
    path = api.perturb(
        terminal.fetched(model),
        like,
        output,
        seed=seed,
        force=force,
        threads=threads,
        progress=terminal.progress,
    )
    terminal.out.print(f"{path}: {format_bytes(path.stat().st_size)}", soft_wrap=True)
