"""Sensitivities for the terminal: per role, with their spread over the layers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from ramgguf.core.units import format_count, format_seconds
from ramgguf.report.grid import Field, Grid, grid_of, to_rich
from ramgguf.sensitivity.result import Sensitivity, TensorSensitivity


@dataclass(frozen=True)
class _Role:
    """The sensitivities of one role's tensors."""

    name: str
    tensors: list[TensorSensitivity]

    def alpha(self, statistic: Callable[[list[float]], Any]) -> str:
        return f"{statistic([t.alpha for t in self.tensors]):.3g}"


def sensitivity_grid(found: Sensitivity) -> Grid:
    """Return per role: tensors, median and range of α, its error, and the median per weight.

    The last column is in relation to the median over all weights' tensors.
    """
    overall = _median_per_weight(found.tensors)
    fields: list[Field[_Role]] = [
        Field("role", lambda r: r.name, number=False),
        Field("tensors", lambda r: str(len(r.tensors))),
        Field("median α", lambda r: r.alpha(np.median)),
        Field("least", lambda r: r.alpha(min)),
        Field("most", lambda r: r.alpha(max)),
        Field("error", lambda r: f"{np.median([t.relative_error for t in r.tensors]):.0%}"),
        Field(
            "per weight",
            lambda r: f"{_median_per_weight(r.tensors) / overall:.2f} ×" if overall else "–",
        ),
    ]
    roles: dict[str, _Role] = {}
    for tensor in found.tensors:
        roles.setdefault(tensor.role, _Role(tensor.role, [])).tensors.append(tensor)
    return grid_of("", fields, roles.values())


def _median_per_weight(tensors: Iterable[TensorSensitivity]) -> float:
    return float(np.median([t.alpha / t.n_weights for t in tensors]))


def remarks(found: Sensitivity) -> list[str]:
    """Return how it was measured and what stands out."""
    tokens = found.tokens
    n_measured = sum(t.origin == "measured" for t in found.tensors)
    summary = (
        f"{format_count(tokens.n_tokens, 'token')} ({tokens.text or tokens.kind}, seed "
        f"{tokens.seed}), {n_measured} of {format_count(len(found.tensors), 'tensor')} measured in "
        f"{format_seconds(found.seconds)}"
    )
    return [summary, *(f"note: {note}" for note in found.notes)]


def print_sensitivity(found: Sensitivity, console: Console, *, verbose: bool) -> None:
    """Print the table, how it was measured and what stands out; with verbose every tensor."""
    console.print(to_rich(sensitivity_grid(found), header_style="bold"))
    for line in remarks(found):
        console.print(line, markup=False)
    if verbose:
        for t in found.tensors:
            console.print(f"  {t.name:<40} {t.alpha:9.4g} ± {t.relative_error:.0%}  {t.origin}")
