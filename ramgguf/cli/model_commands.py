"""The commands that read a model: quantize, measure."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.cli import memory_options as mem
from ramgguf.cli import options as opt
from ramgguf.cli.check_commands import FAILED
from ramgguf.cli.exports import export_plan
from ramgguf.cli.groups import grouped
from ramgguf.cli.plan_commands import show_speed_front
from ramgguf.cli.prepared import Weighed, calibrated, measured_projector, with_projector
from ramgguf.cli.sensitivity_commands import load_or_measure
from ramgguf.cluster.executors import connected
from ramgguf.core.errors import PlanError
from ramgguf.core.escape import to_json
from ramgguf.core.files import require_distinct
from ramgguf.core.machine import Available, available_memory, within_cgroup
from ramgguf.core.parallel import default_threads
from ramgguf.core.units import format_count, format_seconds, parse_seconds, parse_size
from ramgguf.deploy import MemoryRequest
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate import scores_here
from ramgguf.gguf.hub import beside
from ramgguf.gguf.shards import model_stem
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.quantize.pipeline import measured_formats
from ramgguf.quants.encoders import DEFAULT_ENCODER
from ramgguf.report.check import print_check
from ramgguf.report.held_out import draft_summary, print_draft, print_held_out
from ramgguf.report.held_out import summary as score_summary
from ramgguf.report.plans import print_plan


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command("quantize", epilog="Example: ramgguf quantize model-f16.gguf --budget 16GB")(
        grouped(quantize)
    )
    app.command("measure", epilog="Example: ramgguf measure model-f16.gguf -o model.rd.json")(
        measure
    )


PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Follow this plan instead of making one.")
]
MeasurementFile = Annotated[
    Path | None, typer.Option("--measurement", help="Use these curves instead of measuring.")
]
Split = Annotated[
    str | None, typer.Option("--split-max-size", help="Write shards of at most this size.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Decode the output and compare with the plan.")
]
SavePlan = Annotated[Path | None, typer.Option("--save-plan", help="Also write the plan here.")]
SensitivityOrMeasure = Annotated[
    str | None,
    typer.Option("--sensitivity", help="Plan by measured α: a file, or `measure` to make it now."),
]
SensitivityTime = Annotated[
    str | None,
    typer.Option("--sensitivity-time", help="How long `measure` may take: 90s, 20m (default), 1h."),
]

Refine = Annotated[
    int,
    typer.Option(
        "--refine", min=0, help="Try so many swaps of formats by forward passes; keep what helps."
    ),
]


MaxKld = Annotated[
    float | None,
    typer.Option(
        "--max-kld",
        help="The smallest file whose KLD on held-out text is at most this many nats per token, "
        "found by writing and scoring several.",
    ),
]
ScoreOption = Annotated[
    bool | None,
    typer.Option(
        "--score/--no-score",
        help="Measure what was lost against the source on held-out text, in about a minute; "
        "default: with auto and best.",
    ),
]


Aim = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="speed: write nothing; show the best plans by size, cost and speed of generation and "
        "prompts, to choose from.",
    ),
]
CheckOption = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check",
        help="Try the file as the command check does, within --memory; exit status 3 if it fails. "
        "Default: with --min-speed.",
    ),
]


def quantize(
    model: opt.Model,
    budget: opt.OptionalBudget = None,
    output: opt.Output = None,
    lora: opt.Lora = None,
    max_kld: MaxKld = None,
    min_speed: opt.MinSpeed = None,
    min_prompt_speed: opt.MinPromptSpeed = None,
    aim: Aim = None,
    memory: mem.MemoryOptions = mem.MemoryOptions(),  # noqa: B008 (frozen)
    quantize_mmproj: mem.QuantizeMmproj = False,
    mmproj_output: mem.MmprojOutput = None,
    choice: opt.PlanChoice = opt.PlanChoice(),  # noqa: B008 (frozen)
    effort: opt.EffortOption = None,
    limit: opt.Time = None,
    encoder: opt.OptionalEncoder = None,
    imatrix: opt.ImatrixFile = None,
    hessian: opt.HessianFile = None,
    scales: opt.ScalesFile = None,
    calibrate: opt.Calibrate = None,
    sensitivity: SensitivityOrMeasure = None,
    sensitivity_time: SensitivityTime = None,
    stand_in: opt.StandInOption = "auto",
    plan_file: PlanFile = None,
    measurement: MeasurementFile = None,
    allow_requantize: opt.Requantize = False,
    refine: Refine = 0,
    split_max_size: Split = None,
    verify: Verify = True,
    score: ScoreOption = None,
    check: CheckOption = None,
    save_plan: SavePlan = None,
    export_tensor_types: opt.ExportTypes = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
    workers: opt.Workers = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write the best mixed-precision GGUF that fits a budget."""
    choice.require_target(writes_model=True)
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    require_distinct(output, mmproj_output, save_plan, export_tensor_types, error=PlanError)
    opt.refuse_existing(save_plan, export_tensor_types, force=force)
    request = memory.request()
    if joint := quantize_mmproj or (mmproj_output is not None and plan_file is None):
        request = with_projector(request, None)
    if aim is not None:
        if aim != "speed":
            raise typer.BadParameter(f"{aim!r} is not speed", param_hint="--target")
        others = {
            "--budget": budget, "--memory": request, "--max-kld": max_kld, "--min-speed": min_speed,
            "--min-prompt-speed": min_prompt_speed, "--plan": plan_file, "--effort": effort,
            "--time": limit, "--refine": refine, "--output": output, "--save-plan": save_plan,
            "--export-tensor-types": export_tensor_types, "--split-max-size": split_max_size,
            "--calibrate": calibrate, "--scales": scales, "--score": score, "--check": check,
            "--mmproj-output": mmproj_output,
        }  # fmt: skip
        idle = [name for name, value in others.items() if value]
        opt.refuse_idle(idle, "--target speed shows plans and writes nothing")
        if sensitivity == "measure":
            raise typer.BadParameter(
                "name a file of the command sensitivity", param_hint="--sensitivity"
            )
        options = choice.options(None if sensitivity is None else Path(sensitivity))
        model = terminal.fetched(model, lora)
        measured = Measurement.load(measurement) if measurement else api.measure(
            model, formats=measured_formats(options), encoder=opt.encoder(encoder).name,
            imatrix=imatrix, hessian=hessian, allow_requantize=allow_requantize, threads=threads,
            progress=terminal.progress,
        )  # fmt: skip
        show_speed_front(measured, model, threads, None, terminal, options, as_json=as_json)
        return
    sizes = (budget is not None or request is not None, plan_file is not None, max_kld is not None)
    if sum(sizes) != 1:
        raise typer.BadParameter(
            "give either --budget, --memory, --max-kld or --plan", param_hint="--budget"
        )
    if max_kld is not None and refine:
        raise typer.BadParameter(
            "--max-kld writes many files, and each would be refined", param_hint="--refine"
        )
    if max_kld is not None and score is False:
        raise typer.BadParameter("--max-kld is verified by a score", param_hint="--no-score")
    is_timed = min_speed is not None or min_prompt_speed is not None
    if is_timed:
        conflicts = {"--max-kld": max_kld is not None, "--plan": plan_file, "--refine": refine}
        if conflicting := ", ".join(name for name, is_given in conflicts.items() if is_given):
            raise typer.BadParameter(
                f"a least speed goes with --budget or --memory, not with {conflicting}",
                param_hint="--min-speed",
            )
    if request is not None and request.offloads and (is_timed or check):
        raise typer.BadParameter(
            "speeds and trials are those of this CPU, with all of the model in RAM: not for a GPU",
            param_hint="--min-speed" if is_timed else "--check",
        )
    if refine and scales:
        raise typer.BadParameter("swaps of formats are tried without", param_hint="--scales")
    if refine and plan_file:
        raise typer.BadParameter("a ready plan is followed as it is", param_hint="--refine")
    if (imatrix or calibrate) and (plan_file or measurement):
        raise typer.BadParameter(
            "a plan or measurement says itself what it was made with", param_hint="--imatrix"
        )
    if imatrix and calibrate:
        raise typer.BadParameter("give one importance matrix", param_hint="--imatrix")
    if plan_file:
        others = {
            "--encoder": encoder is not None,
            "--hessian": hessian is not None,
            "--scales": scales is not None,
            "--sensitivity": sensitivity is not None,
            "--allow-requantize": allow_requantize,
        }
        given = [name for name in choice.given() if name != "--for" or choice.binds_formats()]
        idle = [*given, *(name for name, given in others.items() if given)]
        opt.refuse_idle(idle, "a ready plan is followed as it is")
    if measurement:
        others = {
            "--encoder": encoder is not None and sensitivity != "measure",
            "--hessian": hessian is not None,
            "--scales": scales is not None,
            "--allow-requantize": allow_requantize,
        }
        idle = [name for name, given in others.items() if given]
        opt.refuse_idle(idle, "a ready measurement says itself how it was made")
    if sensitivity_time is not None and sensitivity != "measure":
        opt.refuse_idle(["--sensitivity-time"], "only --sensitivity measure takes time")
    if workers and not (refine or sensitivity == "measure"):
        raise typer.BadParameter(
            "workers run passes: of --refine or --sensitivity measure", param_hint="--executor"
        )
    steps = {
        "--plan": plan_file,
        "--measurement": measurement,
        "--imatrix": imatrix,
        "--hessian": hessian,
        "--scales": scales,
        "--calibrate": calibrate,
        "--sensitivity": sensitivity,
        "--refine": refine or None,
        "--objective": choice.objective,
        "--encoder": encoder,
        "--max-kld": max_kld,
        "--stand-in": None if stand_in == "auto" else stand_in,
    }
    level = opt.effort(effort, limit, steps)
    if stand_in != "auto" and not (calibrate or sensitivity == "measure"):
        opt.refuse_idle(["--stand-in"], "neither --calibrate nor --sensitivity measure is given")
    scores = level != "fast" if score is None else score
    chosen = opt.encoder(encoder)
    model = terminal.fetched(model, lora)
    if joint and request is not None and request.beside.mmproj is not None:
        found = measured_projector(
            request.beside.mmproj, opt.split_formats(choice.formats), chosen, threads, terminal,
            allow_requantize=allow_requantize,
        )  # fmt: skip
        request = with_projector(request, found)
    weighed = Weighed(imatrix, hessian)
    if calibrate:
        weighed = calibrated(
            model, calibrate, threads, terminal, hessians=chosen.needs_hessian, stand_in=stand_in
        )
    with connected(workers) as executor:
        planned_by = chosen.plans_by if not (plan_file or measurement) else None
        sensed = load_or_measure(
            model,
            sensitivity,
            encoder=planned_by or chosen.name,
            weighed=Weighed(weighed.imatrix, None) if planned_by else weighed,
            limit=sensitivity_time or "20m",
            threads=threads,
            executor=executor,
            stand_in=stand_in,
            terminal=terminal,
        )
        made = api.quantize(
            model,
            None if plan_file or max_kld is not None else mem.size_limit(budget, request, model),
            output,
            max_kld=max_kld,
            min_speed=min_speed,
            min_prompt_speed=min_prompt_speed,
            from_plan=Plan.load(plan_file) if plan_file else None,
            measurement=Measurement.load(measurement) if measurement else None,
            encoder=None if encoder is None else chosen.name,
            imatrix=weighed.imatrix,
            hessian=weighed.hessian,
            scales=scales,
            allow_requantize=allow_requantize,
            refine=refine,
            effort=level,
            seconds=None if limit is None else parse_seconds(limit),
            score=scores and scores_here(),
            split_max_bytes=parse_size(split_max_size) if split_max_size else None,
            force=force,
            verify=verify,
            mmproj_output=mmproj_output,
            threads=threads,
            executor=executor,
            progress=terminal.progress,
            announce=terminal.announce,
            **choice.options(sensed),
        )
    # Without -o the model's name was not known before.
    require_distinct(*made.paths, save_plan, export_tensor_types, error=PlanError)
    export_plan(made.plan, save_plan, export_tensor_types, terminal)
    checked = None
    if is_timed if check is None else check:
        uses = made.plan.memory.beside if made.plan.memory else ()
        trial = check_request(request, threads, sum(use.total for use in uses))
        checked = check_file(made.paths[0], trial, announce=terminal.announce)
    if as_json:
        print(to_json(_summary(made, checked)))
        _require_passed(checked)
        return
    print_plan(made.plan, terminal.out, verbose=verbose)
    if made.score is not None:
        print_held_out(made.score, terminal.out)
    elif score and not scores_here():
        terminal.announce("not scored: pip install 'ramgguf[eval]' measures what was lost")
    if made.draft is not None:
        print_draft(made.draft, terminal.out)
    _print_written(made, terminal)
    if made.mmproj is not None:
        _print_written(made.mmproj, terminal)
    if made.modelfile is not None:
        name = shlex.quote(str(made.modelfile))
        terminal.out.print(f"{made.modelfile}: ollama create NAME -f {name}", soft_wrap=True)
    if checked is not None:
        print_check(checked, terminal.out)
    _require_passed(checked)


def _print_written(made: api.Quantized, terminal: opt.Terminal) -> None:
    seconds = ", ".join(f"{name} {format_seconds(s)}" for name, s in made.seconds.items())
    said = (
        "not verified"
        if made.worst_departure is None
        else f"every tensor decoded again: errors as planned (±{made.worst_departure:.0e})"
    )
    terminal.out.print(
        f"{', '.join(str(p) for p in made.paths)}: {said}; {seconds}", soft_wrap=True
    )


def check_request(
    request: MemoryRequest | None, threads: int | None, beside: int = 0
) -> CheckRequest:
    """Return how the file is tried: within the memory asked for, or what is left here.

    So many bytes of the memory asked for are for what runs beside the model, which is not tried.
    """
    if request is None or request.ram is None:
        limit = available_memory()
    else:
        source = "--memory less what runs beside" if beside else "--memory"
        limit = within_cgroup(Available(request.ram - beside, source))
    shape = ContextShape(4096) if request is None else replace(request.shape, n_seq=1)
    return CheckRequest(shape, limit, n_threads=threads or default_threads())


def _require_passed(checked: CheckResult | None) -> None:
    if checked is not None and not checked.passed:
        raise typer.Exit(FAILED)


def _summary(made: api.Quantized, checked: CheckResult | None) -> dict[str, object]:
    return {
        "paths": [str(p) for p in made.paths],
        "modelfile": None if made.modelfile is None else str(made.modelfile),
        "n_bytes": made.n_bytes,
        "mmproj": None if made.mmproj is None else _summary_of_projector(made.mmproj),
        "budget": made.plan.budget,
        "memory": made.plan.memory.model_dump() if made.plan.memory else None,
        "division": made.plan.division.model_dump() if made.plan.division else None,
        "speed": made.plan.speed.model_dump() if made.plan.speed else None,
        "check": None if checked is None else json.loads(checked.to_json()),
        "bpw": made.plan.bpw,
        "objective": made.plan.objective,
        "total_cost": made.plan.total_cost,
        "predicted_kld": made.plan.predicted_kld and made.plan.predicted_kld.model_dump(),
        "gap": made.plan.gap,
        "plan_sha256": made.plan.sha256(),
        "verified": made.worst_departure is not None,
        "seconds": made.seconds,
        "notes": list(made.plan.notes),
        "score": None if made.score is None else score_summary(made.score),
        "draft": None if made.draft is None else draft_summary(made.draft),
    }


def _summary_of_projector(made: api.Quantized) -> dict[str, object]:
    return {
        "paths": [str(p) for p in made.paths],
        "n_bytes": made.n_bytes,
        "bpw": made.plan.bpw,
        "total_cost": made.plan.total_cost,
        "plan_sha256": made.plan.sha256(),
        "notes": list(made.plan.notes),
    }


def measure(
    model: opt.Model,
    output: opt.Output = None,
    formats: opt.Formats = None,
    encoder: opt.EncoderOption = DEFAULT_ENCODER,
    imatrix: opt.ImatrixFile = None,
    hessian: opt.HessianFile = None,
    allow_requantize: opt.Requantize = False,
    force: opt.Force = False,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Measure every tensor's rate–distortion curve and write it as JSON."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    opt.require_model(model)
    path = output or beside(model, f"{model_stem(model)}.rd.json")
    opt.refuse_existing(path, force=force)
    measured = api.measure(
        terminal.fetched(model),
        formats=opt.split_formats(formats),
        encoder=opt.encoder(encoder).name,
        imatrix=imatrix,
        hessian=hessian,
        allow_requantize=allow_requantize,
        threads=threads,
        progress=terminal.progress,
    )
    measured.save(path)
    if as_json:
        print(measured.to_json())
        return
    n_points = sum(len(t.points) for t in measured.tensors)
    rate = measured.n_weights / measured.seconds / 1e6
    terminal.out.print(
        f"{path}: {format_count(n_points, 'point')} of "
        f"{format_count(len(measured.tensors), 'tensor')}, {measured.n_weights:,} weights, in "
        f"{format_seconds(measured.seconds)} ({rate:,.0f} M weights/s)"
    )
    for note in measured.notes:
        terminal.out.print(f"note: {note}", soft_wrap=True)
