"""The front of size, cost and speed for the terminal."""

from collections.abc import Iterator

from rich.console import Console

from ramgguf.core.units import format_bytes, format_count
from ramgguf.plan.objectives import MEASURED
from ramgguf.plan.speed_front import FrontPlan, SpeedFront
from ramgguf.report.grid import Field, Grid, grid_of, to_rich
from ramgguf.report.numbers import kld


def speed_front_grid(front: SpeedFront) -> Grid:
    """Return a row for each plan that is shown, by size."""

    def predicted(p: FrontPlan) -> str:
        return "–" if p.kld is None else f"{kld(p.kld.kld)} ({kld(p.kld.low)}–{kld(p.kld.high)})"

    fields: list[Field[FrontPlan]] = [
        Field("size", lambda p: format_bytes(p.n_bytes)),
        Field("bpw", lambda p: f"{front.bpw(p):.3f}"),
        Field(front.objective, lambda p: f"{p.cost:.4g}"),
        *([Field("KLD, nats", predicted)] if _predicts(front) else []),
        Field("generation, tokens/s", lambda p: f"{p.generation:.3g}"),
        Field("prompts, tokens/s", lambda p: f"{p.prompt:.3g}"),
    ]
    return grid_of("", fields, front.spread())


def _predicts(front: SpeedFront) -> bool:
    return any(p.kld is not None for p in front.plans)


def remarks(front: SpeedFront) -> Iterator[str]:
    """Yield what the figures are, and how many plans there are."""
    shown = len(front.spread())
    yield (
        f"{shown} of {format_count(len(front.plans), 'plan')} of which none is smaller, better and "
        f"faster than another; speeds are predicted for {format_count(front.n_threads, 'thread')} "
        f"of {front.cpu}, "
        + ("cost by sensitivities" if front.objective in MEASURED else "cost by priors")
        + ("; KLD is predicted, with its 95 % interval" if _predicts(front) else "")
    )
    yield (
        "quantize MODEL --budget SIZE --min-speed GENERATION --min-prompt-speed PROMPTS makes one "
        "of them, or one between"
    )
    yield from (f"note: {note}" for note in front.notes)


def print_speed_front(front: SpeedFront, console: Console) -> None:
    """Print the plans and what their figures are."""
    console.print(to_rich(speed_front_grid(front), header_style="bold"))
    for line in remarks(front):
        console.print(line, soft_wrap=True, markup=False)
