"""The commands about plans: plan, frontier, explain, diff, recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

import ramgguf as api
from ramgguf.cli import memory_options as mem
from ramgguf.cli import options as opt
from ramgguf.cli.exports import export_plan, export_types
from ramgguf.cli.groups import grouped
from ramgguf.cli.prepared import with_projector
from ramgguf.core.errors import PlanError
from ramgguf.core.escape import to_json
from ramgguf.core.files import write_atomically
from ramgguf.core.units import format_bytes
from ramgguf.deploy import MemoryLimit
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, speed_front
from ramgguf.plan.explanation import Explanation, PlanExplanation, Step
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.recipes import Change, Recipe
from ramgguf.plan.result import Plan
from ramgguf.quantize.speed_target import speed_limit
from ramgguf.report.choices import print_difference, print_explanation, print_recipe
from ramgguf.report.frontier import curve_svg, print_curve
from ramgguf.report.memory import print_memory
from ramgguf.report.plans import print_plan
from ramgguf.report.speed_front import print_speed_front
from ramgguf.report.tensor_types import recipe_types


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command("plan", epilog="Example: ramgguf plan model.rd.json --budget 4.5bpw -o plan.json")(
        grouped(plan)
    )
    app.command(
        "frontier", epilog="Example: ramgguf frontier model.rd.json --budget 104MB --svg c.svg"
    )(grouped(curve))
    app.command("curve", hidden=True)(grouped(curve))  # what it was called at first
    app.command("explain", epilog="Example: ramgguf explain plan.json --measurement model.rd.json")(
        explain
    )
    app.command("diff", epilog="Example: ramgguf diff mine.gguf theirs-Q4_K_M.gguf")(diff)
    app.command("recipe", epilog="Example: ramgguf recipe theirs.gguf -o theirs.recipe.json")(
        recipe
    )


RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="Give each tensor the format it has in this recipe or GGUF."),
]
PlanOrModel = typer.Argument(
    help="A plan, a recipe or any GGUF file, also hf://ORG/REPO/FILE.gguf."
)


def plan(
    measurement: Annotated[Path, typer.Argument(metavar="MEASUREMENT", help="From measure.")],
    budget: opt.OptionalBudget = None,
    output: opt.Output = None,
    memory: mem.MemoryOptions = mem.MemoryOptions(),  # noqa: B008 (frozen)
    mmproj_measurement: mem.MmprojMeasurement = None,
    model: mem.SourceModel = None,
    recipe: RecipeFile = None,
    choice: opt.PlanChoice = opt.PlanChoice(),  # noqa: B008 (frozen)
    sensitivity: opt.SensitivityFile = None,
    export_tensor_types: opt.ExportTypes = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Choose a format for every tensor so that the output fits a budget."""
    choice.require_target(writes_model=False)
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    opt.refuse_existing(output, export_tensor_types, force=force)
    request = memory.request()
    if mmproj_measurement is not None:
        request = with_projector(request, Measurement.load(mmproj_measurement))
    if (budget is None and request is None) == (recipe is None):
        raise typer.BadParameter(
            "give either --budget, --memory or --recipe", param_hint="--budget"
        )
    if model is not None and request is None:
        opt.refuse_idle(["--model"], "only with --memory, --fit or --vram")
    if recipe is not None:
        idle = [*choice.given(), *(["--sensitivity"] if sensitivity is not None else [])]
        opt.refuse_idle(idle, "a recipe gives every tensor its format")
        made = api.follow(measurement, recipe)
    else:
        limit = mem.size_limit(budget, request, model and terminal.fetched(model))
        made = api.plan(measurement, limit, **choice.options(sensitivity))
    export_plan(made, output, export_tensor_types, terminal)
    if as_json:
        print(made.to_json())
        return
    print_plan(made, terminal.out, verbose=verbose)
    for path in (output, export_tensor_types):
        if path is not None:
            n_bytes = format_bytes(path.stat().st_size)
            terminal.out.print(f"wrote {path} ({n_bytes})", soft_wrap=True)


def curve(
    source: Annotated[
        Path, typer.Argument(metavar="MEASUREMENT", help="From measure; or a saved frontier.")
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="Also show the plan of this size; repeatable."),
    ] = None,
    output: opt.Output = None,
    memory: mem.MemoryOptions = mem.MemoryOptions(),  # noqa: B008 (frozen)
    model: mem.SourceModel = None,
    svg: Annotated[Path | None, typer.Option("--svg", help="Draw the frontier here.")] = None,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            help="Show the best plans by size, cost and speed of generation and prompts, here.",
        ),
    ] = False,
    threads: opt.Threads = None,
    choice: opt.PlanChoice = opt.PlanChoice(),  # noqa: B008 (frozen)
    sensitivity: opt.SensitivityFile = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Show the best size–quality trade-offs from the smallest safe size to 8.5 bpw."""
    choice.require_target(writes_model=False)
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    opt.refuse_existing(output, svg, force=force)
    request = memory.request()
    if speed:
        _speed_front(source, model, threads, choice, sensitivity, output, terminal, as_json,
                     {"--budget": budget, "--memory": request, "--svg": svg})  # fmt: skip
        return
    if threads is not None:
        opt.refuse_idle(["--threads"], "only --speed measures")
    if model is not None and request is None:
        opt.refuse_idle(["--model"], "only with --memory, --fit or --vram")
    if memory.cpu_formats is not None:
        opt.refuse_idle(["--cpu-formats"], "a frontier's formats are the same on both sides")
    if _is_frontier(source):
        idle = [*choice.given(), *(["--sensitivity"] if sensitivity is not None else [])]
        opt.refuse_idle(idle, "a saved frontier was made with its options")
        made = Frontier.load(source)
    else:
        made = api.curve(source, **choice.options(sensitivity))
    plans = [api.plan(made, b) for b in budget or ()]
    if request is not None:
        source_model = model and terminal.fetched(model)
        plans.append(api.plan(made, MemoryLimit(request, model=source_model)))
    if output is not None:
        made.save(output)
    if svg is not None:
        write_atomically(svg, curve_svg(made, plans).encode(), error=PlanError)
    if as_json:
        print(made.to_json())
        return
    print_curve(made, plans, terminal.out)
    for found in plans:
        if found.memory is not None:
            print_memory(found.memory, found.division, terminal.out)


def _speed_front(
    source: Path,
    model: Path | None,
    threads: int | None,
    choice: opt.PlanChoice,
    sensitivity: Path | None,
    output: Path | None,
    terminal: opt.Terminal,
    as_json: bool,
    others: Mapping[str, object],
) -> None:
    """Show the front of size, cost and speed of a measurement."""
    opt.refuse_idle(
        (name for name, value in others.items() if value), "--speed shows plans of all sizes"
    )
    if _is_frontier(source):
        opt.refuse_idle(["--speed"], "a saved frontier knows one plan of each size; name what "
                        "measure wrote")  # fmt: skip
    measurement = Measurement.load(source)
    show_speed_front(
        measurement, terminal.fetched(model or Path(measurement.source.path)), threads, output,
        terminal, choice.options(sensitivity), as_json=as_json,
    )  # fmt: skip


def show_speed_front(
    measurement: Measurement,
    model: Path,
    threads: int | None,
    output: Path | None,
    terminal: opt.Terminal,
    options: PlanOptions,
    *,
    as_json: bool,
) -> None:
    """Print, and save if there is an output, the front of what was measured of the model."""
    with open_gguf(model) as file:
        require_model("the measurement", measurement.source, file)
    limit = speed_limit(
        model, 0.0, 0.0, names=options.get("formats") or measurement.formats, threads=threads,
        progress=terminal.progress, announce=terminal.announce,
    )  # fmt: skip
    front = speed_front(measurement, limit, **options)
    if output is not None:
        front.save(output)
    if as_json:
        print(front.to_json())
        return
    print_speed_front(front, terminal.out)


def _is_frontier(path: Path) -> bool:
    try:
        with path.open("rb") as f:
            return b'"ramgguf.frontier/' in f.read(200)
    except OSError as e:
        raise PlanError(f"{path}: cannot be read: {e.strerror}") from None


def explain(
    plan: Annotated[Path, typer.Argument(help="From plan, or quantize --save-plan.")],
    tensor: Annotated[str | None, typer.Argument(help="One tensor, in full.")] = None,
    *,
    measurement: Annotated[
        Path, typer.Option("--measurement", "-m", help="What the plan was made from.")
    ],
    sensitivity: Annotated[
        Path | None,
        typer.Option("--sensitivity", help="The sensitivities that it was made by, if it was."),
    ] = None,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Say why each tensor has its format, and what one step up or down would cost and bring."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    explained = api.explain(Plan.load(plan), measurement, sensitivity)
    if as_json:
        print(to_json(_explanation(explained, tensor), indent=1))
        return
    print_explanation(explained, tensor, terminal.out)


def _explanation(explained: PlanExplanation, tensor: str | None) -> dict[str, object]:
    def step(s: Step | None) -> dict[str, object] | None:
        return None if s is None else {"format": s.format, "n_bytes": s.n_bytes, "cost": s.cost}

    def one(e: Explanation) -> dict[str, object]:
        return {
            "name": e.assignment.name,
            "format": e.assignment.format,
            "cost": e.assignment.cost,
            "tied": e.tied,
            "down": step(e.down),
            "up": step(e.up),
            "barred": {b.format: b.reason for b in e.barred},
            "reason": explained.reason(e),
        }

    chosen = explained.tensors if tensor is None else (explained.of(tensor),)
    return {"price": explained.price, "tensors": [one(e) for e in chosen]}


def diff(
    a: Annotated[Path, PlanOrModel],
    b: Annotated[Path, PlanOrModel],
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare two plans or two GGUF files tensor by tensor."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    difference = api.diff(terminal.fetched(a), terminal.fetched(b))
    if as_json:
        print(to_json({"same": difference.n_same, "changes": _changes(difference.changes)}))
        return
    print_difference(difference, terminal.out, verbose=verbose)


def _changes(changes: tuple[Change, ...]) -> list[dict[str, object]]:
    return [
        {
            "name": c.name,
            "role": c.role,
            "a": c.a.format if c.a else None,
            "b": c.b.format if c.b else None,
            "n_bytes": c.n_bytes,
        }
        for c in changes
    ]


def recipe(
    model: Annotated[Path, PlanOrModel],
    output: opt.Output = None,
    export_tensor_types: Annotated[
        Path | None,
        typer.Option("--export-tensor-types", help="For llama-quantize --tensor-type-file."),
    ] = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Extract which format each tensor of a GGUF file has, to be given to another model."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    opt.refuse_existing(output, export_tensor_types, force=force)
    found = Recipe.read(terminal.fetched(model))
    if output is not None:
        found.save(output)
    export_types(recipe_types(found), export_tensor_types, terminal)
    if as_json:
        print(found.to_json())
        return
    print_recipe(found, terminal.out)
