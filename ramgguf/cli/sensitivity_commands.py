"""The command that measures how much each tensor's error matters: sensitivity."""

from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.cli.prepared import Weighed, reweighed
from ramgguf.cluster.executors import connected
from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import reading
from ramgguf.core.units import parse_seconds
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem
from ramgguf.llama.tokens import N_CTX
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName
from ramgguf.report.sensitivity import print_sensitivity
from ramgguf.sensitivity.result import Sensitivity


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "sensitivity",
        epilog="Example: ramgguf sensitivity model-f16.gguf --time 20m -o model.sens.json",
    )(sensitivity)


def sensitivity(
    model: opt.Model,
    output: opt.Output = None,
    tokens: opt.TokenSources = "self",
    limit: Annotated[
        str | None,
        typer.Option(
            "--time", help="Fit this time by fewer tokens or layers: 90s, 20m (default), 1h."
        ),
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option("--sequences", min=1, help="So many sequences, whatever the time."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of each sequence.")
    ] = N_CTX,
    encoder: opt.EncoderOption = DEFAULT_ENCODER,
    imatrix: opt.ImatrixFile = None,
    hessian: opt.HessianFile = None,
    seed: opt.TokenSeed = 0,
    stand_in: opt.StandInOption = "auto",
    scratch: opt.Scratch = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
    workers: opt.Workers = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure how much each tensor's error matters, by forward passes of llama.cpp.

    What was measured is kept beside the output: run the command again after a kill.
    """
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    if sequences is not None and limit is not None:
        opt.refuse_idle(["--time"], "--sequences takes what it takes")
    opt.require_model(model)
    path = output or beside(model, f"{model_stem(model)}.sens.json")
    reading(model)  # so that writing there is refused now, not after minutes of passes
    opt.refuse_existing(path, force=force)
    journal = path.with_name(f"{path.name}.partial")
    with connected(workers) as executor:
        found = api.sensitivity(
            terminal.fetched(model),
            tokens=tokens,
            encoder=opt.encoder(encoder).name,
            imatrix=imatrix,
            hessian=hessian,
            n_sequences=sequences,
            n_ctx=context,
            seed=seed,
            seconds=parse_seconds(limit or "20m"),
            journal=journal,
            folder=scratch,
            stand_in=opt.stand_in(stand_in),
            threads=threads,
            executor=executor,
            progress=terminal.progress,
            announce=terminal.announce,
        )
    found.save(path)
    try:
        journal.unlink(missing_ok=True)
    except OSError as e:
        raise PlanError(f"{journal} cannot be removed: {e.strerror}") from None
    if as_json:
        print(found.to_json())
        return
    print_sensitivity(found, terminal.out, verbose=verbose)
    terminal.out.print(
        f"wrote {path}; give it to plan, frontier or quantize with --sensitivity", soft_wrap=True
    )


def load_or_measure(
    model: Path,
    asked: str | None,
    *,
    encoder: EncoderName,
    weighed: Weighed,
    limit: str,
    threads: int | None,
    executor: Executor | None = None,
    stand_in: str = "auto",
    terminal: opt.Terminal,
) -> Sensitivity | None:
    """Return what `--sensitivity` asks for; what is measured is kept beside the model.

    A sensitivity with other error weights is converted. A run that was killed goes on from the
    file beside it, and one that was finished is used again.
    """
    if asked is None:
        return None
    if asked != "measure":
        return reweighed(Sensitivity.load(Path(asked)), model, weighed, terminal)
    path = beside(model, f"{model_stem(model)}.sens.json")
    if path.exists():
        terminal.announce(f"using {path}, measured before; remove it to measure again")
        return reweighed(Sensitivity.load(path), model, weighed, terminal)
    journal = path.with_name(f"{path.name}.partial")
    found = api.sensitivity(
        model,
        encoder=encoder,
        imatrix=weighed.imatrix,
        hessian=weighed.hessian,
        seconds=parse_seconds(limit),
        journal=journal,
        stand_in=opt.stand_in(stand_in),
        threads=threads,
        executor=executor,
        progress=terminal.progress,
        announce=terminal.announce,
    )
    found.save(path)
    journal.unlink(missing_ok=True)
    terminal.announce(f"wrote {path}")
    return found
