"""Plans for the terminal: formats by role, size, how near the optimum, what more would buy."""

from collections.abc import Iterator

from rich.console import Console

from ramgguf.core.units import format_bytes, format_count
from ramgguf.gguf.architecture import PROJECTORS
from ramgguf.plan.objectives import DEFAULT_OBJECTIVE
from ramgguf.plan.result import Assignment, Plan, PlannedSpeed, PredictedKLD, Refinement
from ramgguf.report.grid import Field, Grid, grid_of, to_rich
from ramgguf.report.memory import print_memory
from ramgguf.report.numbers import kld
from ramgguf.report.roles import RoleTensors, largest_first


def role_grid(plan: Plan) -> Grid:
    """Return one row per role: tensors, formats with their counts, bytes, bpw, share of cost."""

    def share(role: RoleTensors[Assignment]) -> str:
        cost = sum(a.cost for a in role.tensors)
        return f"{cost / plan.total_cost:.1%}" if plan.total_cost > 0 else "–"

    fields: list[Field[RoleTensors[Assignment]]] = [
        Field("role", lambda r: r.role, number=False),
        Field("formats (tensors)", lambda r: r.formats(), number=False),
        Field("bytes", lambda r: format_bytes(r.n_bytes)),
        Field("bpw", lambda r: f"{r.bpw:.2f}"),
        Field("cost", share),
    ]
    return grid_of("", fields, largest_first(plan.assignments))


def size(plan: Plan) -> str:
    """Return the bytes of the file, of its weights, and the bits per weight."""
    data, used = sum(a.n_bytes for a in plan.assignments), plan.n_bytes / plan.budget
    return (
        f"file {plan.n_bytes:,} bytes ({used:.2%} of the budget), weights {data:,} bytes, "
        f"{plan.bpw:.3f} bpw"
    )


def print_plan(plan: Plan, console: Console, *, verbose: bool = False) -> None:
    """Print the plan: per role, in total, how near the optimum, what more budget would buy."""
    console.print(to_rich(role_grid(plan), header_style="bold"))
    console.print(size(plan), soft_wrap=True)
    if plan.memory is not None:
        print_memory(plan.memory, plan.division, console)
    console.print(optimality(plan), soft_wrap=True)
    if plan.predicted_kld is not None:
        console.print(prediction(plan.predicted_kld), soft_wrap=True)
    if plan.speed is not None:
        console.print(speed(plan.speed), soft_wrap=True)
    for line in after_planning(plan):
        console.print(line, soft_wrap=True)
    if plan.next_percent is not None and plan.total_cost > 0:
        step = plan.next_percent
        saved = 1 - step.total_cost / plan.total_cost
        console.print(
            f"1 % more budget ({format_bytes(step.n_bytes)}) would lower the objective by "
            f"{saved:.1%}, changing {format_count(step.n_changes, 'tensor')}",
            soft_wrap=True,
        )
    is_guessed = plan.objective == DEFAULT_OBJECTIVE and plan.total_cost > 0
    if is_guessed and plan.source.architecture not in PROJECTORS:
        console.print(
            "note: what matters was guessed from the tensors' roles; `--effort best`, "
            "`--sensitivity measure` or `ramgguf sensitivity` measures it",
            soft_wrap=True,
        )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if verbose:
        for a in plan.assignments:
            note = f"  ({a.note})" if a.note else ""
            line = f"  {a.name:<40} {a.source_format:>5} → {a.format:<7} {a.nmse:.3e}{note}"
            console.print(line, soft_wrap=True)
    if plan.mmproj is not None:
        console.print(f"\nthe projector, {plan.mmproj.source.path}:", soft_wrap=True)
        print_plan(plan.mmproj, console, verbose=verbose)


def speed(found: PlannedSpeed) -> str:
    """Return how fast the plan is, how fast it had to be, and who says so."""

    def one(what: str, value: float, least: float) -> str:
        return f"{what} {value:.3g} tokens/s" + (f" (at least {least:g})" if least else "")

    both = []
    if found.generation:
        both.append(one("generation", found.generation, found.least_generation))
    if found.least_prompt or not found.is_measured:
        both.append(one("prompts", found.prompt, found.least_prompt))
    how = "measured" if found.is_measured else "predicted from the speed of formats"
    return (
        f"speed: {', '.join(both)}, {how} with {format_count(found.n_threads, 'thread')} of "
        f"{found.cpu}"
    )


def optimality(plan: Plan) -> str:
    """Return the plan's objective, its value and how near the optimum that is."""
    gap = "proven optimal" if plan.gap == 0 else f"within {plan.gap:.1g} of the optimum, proven"
    return f"objective {plan.objective}: {plan.total_cost:.6g}, {gap}"


def prediction(found: PredictedKLD) -> str:
    """Return what KLD the sensitivities predict, with its interval."""
    return (
        f"predicted KLD {kld(found.kld)} nats per token ({kld(found.low)}–{kld(found.high)}, 95 %) "
        "on text of several domains; `--score` measures it"
    )


def after_planning(plan: Plan) -> Iterator[str]:
    """Yield a sentence for each thing that was done once the formats were chosen."""
    if plan.refinement is not None:
        yield refinement(plan.refinement)
    if (found := plan.quantized_inputs) is not None:
        yield (
            "rounded layer by layer for the inputs that quantized layers leave, on "
            f"{found.n_sequences} × {found.n_ctx} tokens of {found.tokens}"
        )


def refinement(found: Refinement) -> str:
    """Return the sentence that says what trials did to the plan."""
    report = found.report
    change = report.after - report.before
    return (
        f"refinement: took {len(found.swaps)} of {format_count(found.n_tried, 'swap')} tried; KLD "
        f"over {format_count(report.n_tokens, 'token')} that decided nothing ({found.tokens}) "
        f"{report.before:.4f} → {report.after:.4f}, a change of {change:+.4f} ± {report.error:.4f} "
        "nats per token"
    )
