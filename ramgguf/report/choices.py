"""Why a plan chose what it chose, and how two plans or files differ, for the terminal."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from ramgguf.core.units import format_bytes, format_count
from ramgguf.plan.explanation import Explanation, PlanExplanation, Step
from ramgguf.plan.recipes import Change, Difference, Recipe, RecipeTensor
from ramgguf.report.grid import Field, grid_of, to_rich
from ramgguf.report.roles import RoleTensors, by_role


def print_explanation(explained: PlanExplanation, wanted: str | None, console: Console) -> None:
    """Print the plan's price and a line per quantized tensor; with `wanted`, that tensor in full.

    Raises PlanError when no tensor is called so.
    """
    plan, one = explained.plan, None if wanted is None else explained.of(wanted)
    console.print(
        f"{format_bytes(plan.n_bytes)}, {plan.bpw:.3f} bpw; the price is "
        f"{explained.price * 1e6:.4g} of {plan.objective} per MB"
    )
    if one is not None:
        _print_tensor(explained, one, console)
        return
    fields: list[Field[Explanation]] = [
        Field("tensor", lambda e: e.assignment.name, number=False),
        Field("format", lambda e: e.assignment.format, number=False),
        Field("why", explained.reason, number=False),
    ]
    chosen = [
        e
        for e in explained.tensors
        if e.assignment.note is None or e.assignment.note.startswith("pinned")
    ]
    console.print(to_rich(grid_of("", fields, chosen), header_style="bold"))


def _print_tensor(explained: PlanExplanation, e: Explanation, console: Console) -> None:
    a = e.assignment
    console.print(
        f"{a.name} ({a.role}, {a.n_weights:,} weights): {a.format}, {format_bytes(a.n_bytes)}, "
        f"NMSE {a.nmse:.3e}, {a.cost:.4g} of {explained.plan.objective}"
    )
    if e.tied:
        console.print(f"tied to {', '.join(e.tied)}: steps are of all together")
    for step, verb in ((e.down, "down"), (e.up, "up")):
        if step is not None:
            console.print(_step(step, verb, explained.price))
    for barred in e.barred:
        console.print(f"not {barred.format}: {barred.reason}")
    console.print(f"why: {explained.reason(e)}")


def _step(step: Step, verb: str, price: float) -> str:
    times = f", {step.rate / price:.3g} × the price" if price > 0 else ""
    sign = "+" if step.n_bytes > 0 else "−"
    return (
        f"{verb:<4} to {step.format}: {sign}{format_bytes(abs(step.n_bytes))}, "
        f"{step.cost:+.4g}, {step.rate * 1e6:.4g} per MB{times}"
    )


def print_difference(difference: Difference, console: Console, *, verbose: bool) -> None:
    """Print both sides' sizes, what changed per role, and with verbose every changed tensor."""
    for side, recipe in (("A", difference.a), ("B", difference.b)):
        console.print(
            f"{side}: {recipe.path}: {recipe.n_bytes:,} bytes, {recipe.bpw:.3f} bpw, "
            f"{format_count(len(recipe.tensors), 'tensor')}"
        )
    fields: list[Field[tuple[str, list[Change]]]] = [
        Field("role", lambda x: x[0], number=False),
        Field("A → B (tensors)", lambda x: _changes(x[1]), number=False),
        Field("bytes", lambda x: f"{sum(c.n_bytes for c in x[1]):+,}"),
    ]
    if difference.changes:
        roles = grid_of("", fields, _by_role(difference.changes))
        console.print(to_rich(roles, header_style="bold"))
    console.print(
        f"{format_count(len(difference.changes), 'tensor')} changed, {difference.n_same} unchanged"
    )
    if verbose:
        for c in difference.changes:
            console.print(f"  {c.name:<40} {_change(c)}  {c.n_bytes:+,}")


def _by_role(changes: Sequence[Change]) -> list[tuple[str, list[Change]]]:
    roles: dict[str, list[Change]] = {}
    for change in changes:
        roles.setdefault(change.role, []).append(change)
    return sorted(roles.items(), key=lambda r: -sum(abs(c.n_bytes) for c in r[1]))


def _changes(changes: Sequence[Change]) -> str:
    counts = Counter(_change(c) for c in changes)
    return "  ".join(f"{text} ×{n}" for text, n in counts.most_common())


def _change(change: Change) -> str:
    a, b = (t.format if t else "absent" for t in (change.a, change.b))
    if a == b and change.a and change.b:
        return f"{a}, {change.a.n_weights:,} → {change.b.n_weights:,} weights"
    return f"{a} → {b}"


def print_recipe(recipe: Recipe, console: Console) -> None:
    """Print how many tensors of each role have which format, and their bytes."""
    fields: list[Field[RoleTensors[RecipeTensor]]] = [
        Field("role", lambda r: r.role, number=False),
        Field("formats (tensors)", lambda r: r.formats(), number=False),
        Field("bytes", lambda r: format_bytes(r.n_bytes)),
        Field("bpw", lambda r: f"{r.bpw:.2f}"),
    ]
    roles = grid_of("", fields, by_role(recipe.tensors))
    console.print(to_rich(roles, header_style="bold"))
    console.print(f"{recipe.path}: {recipe.n_bytes:,} bytes, {recipe.bpw:.3f} bpw")
