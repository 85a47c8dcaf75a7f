"""The commands around quantization: calibrate, and the control perturb."""

from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.core.escape import to_json
from ramgguf.core.units import format_bytes, parse_size
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem
from ramgguf.report.calibration import print_calibration, summary


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(
        "calibrate",
        epilog="Example: ramgguf calibrate model-f16.gguf -o model.imatrix.gguf",
    )(calibrate)
    app.command(
        "perturb",
        epilog="Example: ramgguf perturb model-f16.gguf --like plan.json -o noisy.gguf --seed 1",
    )(perturb)


def calibrate(
    model: opt.Model,
    output: opt.Output = None,
    tokens: opt.TokenSources = "self",
    sequences: Annotated[
        int, typer.Option("--sequences", min=1, help="How many sequences are read.")
    ] = 12,
    context: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of each sequence.")
    ] = 512,
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

    With tokens drawn from the model itself no data are needed. llama-quantize takes the file, too.
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
        announce=terminal.err.print if not (quiet or as_json) else lambda _: None,
    )
    if as_json:
        print(to_json(summary(found)))
    else:
        print_calibration(found, terminal.out)


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
