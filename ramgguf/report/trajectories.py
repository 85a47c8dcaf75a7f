"""Where continuations part from the reference's, for the terminal, model cards and pages."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console

from ramgguf.core.units import format_bytes, format_count
from ramgguf.evaluate.continuations import SHORT, TrajectoryResult
from ramgguf.evaluate.intervals import Estimate
from ramgguf.report import figures
from ramgguf.report.grid import Field, Grid, captioned_markdown, grid_of
from ramgguf.report.numbers import estimate_json, with_interval
from ramgguf.report.terminal import print_captioned

T = TypeVar("T")
_Part = tuple[TrajectoryResult, str | None]  # a model's continuations in a domain; None: in all
TITLE = "Greedy continuations equal to the reference's (95 % intervals)"


def trajectory_grid(results: Sequence[TrajectoryResult]) -> Grid:
    """Return a row per model and domain: the median of equal tokens, shares identical."""
    n_tokens = max(r.n_tokens for r in results)
    lengths = sorted({min(SHORT, n_tokens), n_tokens})
    fields: list[Field[_Part]] = [
        Field("model", lambda x: _once(x, x[0].model.label), number=False),
        Field("size", lambda x: _once(x, format_bytes(x[0].model.n_bytes)), 4),
        Field("domain", lambda x: x[1] or "all", number=False),
        Field("prompts", lambda x: str(sum(x[1] in (None, d) for d in x[0].domains)), 3),
        Field("median equal tokens", lambda x: _median(x[0].median(x[1]), x[0].n_tokens)),
        *(Field(f"identical after {n}", _survival(n)) for n in lengths),
    ]
    parts = [(r, domain) for r in results for domain in (None, *dict.fromkeys(r.domains))]
    return grid_of(TITLE, fields, parts)


def _once(part: _Part, text: str) -> str:
    """Return what stands in a model's first row only."""
    return text if part[1] is None else ""


def _survival(n: int) -> Callable[[_Part], str]:
    return lambda part: _share(part[0].survival(n, part[1]))


def _share(found: Estimate) -> str:
    return with_interval(found, lambda x: f"{100 * x:.0f} %")


def _median(found: Estimate, n_tokens: int) -> str:
    return with_interval(found, lambda x: f"≥ {n_tokens}" if x >= n_tokens else f"{x:.0f}")


def trajectory_line(result: TrajectoryResult) -> str:
    """Return how it was measured."""
    n = len(set(result.documents))
    return (
        f"{format_count(len(result.agreed), 'prompt')}, {format_count(result.n_tokens, 'token')} "
        f"each, {result.batch} side by side, against {result.reference.label}; llama.cpp "
        f"{result.llama_cpp_build}{', safe kernels' if result.safe_kernels else ''}; intervals "
        f"over {format_count(n, 'document')}."
    )


def print_trajectories(results: Sequence[TrajectoryResult], console: Console) -> None:
    """Print the table and how it was measured."""
    print_captioned(console, trajectory_grid(results), map(trajectory_line, results))


def trajectories_markdown(results: Sequence[TrajectoryResult]) -> str:
    """Return the table for a model card."""
    return captioned_markdown(trajectory_grid(results), map(trajectory_line, results))


def summary(result: TrajectoryResult) -> dict[str, object]:
    """Return the figures of all prompts and of each domain, and the survival curve, for --json."""
    short = min(SHORT, result.n_tokens)
    parts = {}
    for domain in (None, *dict.fromkeys(result.domains)):
        parts[domain or "all"] = {
            "median_equal_tokens": estimate_json(result.median(domain)),
            f"identical_{short}": estimate_json(result.survival(short, domain)),
            f"identical_{result.n_tokens}": estimate_json(result.survival(result.n_tokens, domain)),
        }
    curve = [{"tokens": n, **estimate_json(found)} for n, found in result.curve()]
    return {"domains": parts, "survival": curve}


def survival_figure(results: Sequence[TrajectoryResult]) -> figures.Figure:
    """Return the share of prompts that are still the reference's, against tokens, with bands."""
    made = figures.figure("tokens generated", "share still identical", 420)
    made.update_layout(showlegend=True, legend={"x": 0.99, "xanchor": "right", "y": 0.98})
    made.update_yaxes(range=[0, 1.02], tickformat=".0%")
    for number, r in enumerate(results):
        curve = r.curve()
        x = _steps([n for n, _ in curve])[1:]
        colour = figures.COLOURS[number % len(figures.COLOURS)]

        def stepped(values: Sequence[float | None]) -> list[float | None]:
            return _steps(values)[:-1]

        if all(e.has_interval for _, e in curve):
            made.add_scatter(
                x=[*x, *reversed(x)],
                y=[
                    *stepped([e.high for _, e in curve]),
                    *reversed(stepped([e.low for _, e in curve])),
                ],
                fill="toself",
                mode="lines",
                line={"width": 0},
                fillcolor=colour,
                opacity=0.15,
                hoverinfo="skip",
                showlegend=False,
            )
        made.add_scatter(
            x=x,
            y=stepped([e.value for _, e in curve]),
            mode="lines",
            line={"color": colour},
            name=r.model.label,
        )
    return made


def _steps(values: Sequence[T]) -> list[T]:
    """Return each value twice: a curve that is flat until it falls has two points at a fall."""
    return [v for v in values for _ in range(2)]
