"""The command that goes from a model to a file proven to run here: pick."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ramgguf.cli import memory_options as mem
from ramgguf.cli import options as opt
from ramgguf.core.errors import PlanError
from ramgguf.core.escape import to_json
from ramgguf.core.files import require_distinct, write_atomically
from ramgguf.core.machine import memory_limit
from ramgguf.core.parallel import default_threads
from ramgguf.core.units import parse_seconds
from ramgguf.deploy.checking import CheckRequest
from ramgguf.deploy.footprint import parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.picking import Picked, PickRequest
from ramgguf.deploy.picking import pick as _pick
from ramgguf.plan import DEFAULT_MIN_SQNR_DB
from ramgguf.plan.planning import PlanOptions
from ramgguf.report.frontier import curve_svg


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "pick",
        epilog="Example: ramgguf pick model-f16.gguf --memory 16GB --context 8192 --min-speed 10",
    )(pick)


def pick(
    model: opt.Model,
    memory: mem.RunsIn = None,
    context: Annotated[int, typer.Option("--context", min=16, help="Tokens of context.")] = 4096,
    cache_type: mem.CacheType = "f16",
    min_speed: opt.MinSpeed = None,
    min_prompt_speed: opt.MinPromptSpeed = None,
    output: opt.Output = None,
    effort: opt.EffortOption = None,
    effort_time: opt.Time = None,
    encoder: opt.OptionalEncoder = None,
    sensitivity: opt.SensitivityFile = None,
    formats: opt.Formats = None,
    min_sqnr: opt.MinSqnr = DEFAULT_MIN_SQNR_DB,
    n_seq: Annotated[
        int, typer.Option("--n-seq", min=0, help="Sequences of 512 tokens to score; 0 for none.")
    ] = 8,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the frontier here.")] = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure, plan, write, try and score: the best file that runs in this memory, fast enough."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    opt.refuse_existing(output, svg, force=force)
    steps = {"--sensitivity": sensitivity, "--encoder": encoder}
    level = opt.effort(effort, effort_time, steps)
    trial = CheckRequest(
        ContextShape(context, 1, *parse_cache_types(cache_type)),
        memory_limit(memory),
        n_threads=threads or default_threads(),
    )
    picked = _pick(
        terminal.fetched(model),
        output,
        PickRequest(
            trial,
            min_speed or 0.0,
            min_prompt_speed or 0.0,
            encoder=opt.encoder(encoder).name,
            n_seq=n_seq,
            effort=level,
            effort_seconds=None if effort_time is None else parse_seconds(effort_time),
        ),
        force=force,
        threads=threads,
        progress=terminal.progress,
        announce=terminal.err.print if terminal.err.is_terminal and not quiet else lambda _: None,
        **PlanOptions(
            sensitivity=sensitivity, formats=opt.split_formats(formats), min_sqnr_db=min_sqnr
        ),
    )
    require_distinct(picked.path, svg, error=PlanError)  # without -o it was not known before
    if svg is not None:
        drawn = curve_svg(picked.frontier, [picked.plan])
        write_atomically(svg, drawn.encode(), error=PlanError)
    if as_json:
        print(to_json(_summary(picked), indent=1))
        return
    terminal.out.print(f"{picked.path}:", soft_wrap=True)
    for reason in picked.reasons():
        terminal.out.print(f"  {reason}", soft_wrap=True)


def _summary(picked: Picked) -> dict[str, object]:
    return {
        "path": str(picked.path),
        "n_bytes": picked.plan.n_bytes,
        "bpw": picked.plan.bpw,
        "plan_sha256": picked.plan.sha256(),
        "reasons": list(picked.reasons()),
        "check": json.loads(picked.trial.to_json()),
        "kld_mean": None if picked.score is None else picked.score.kld_mean,
    }
