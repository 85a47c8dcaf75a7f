"""Sensitivities for the terminal: per role, with their spread over the layers."""

import numpy as np
from rich.console import Console

from ramgguf.core.units import format_seconds
from ramgguf.report.grid import Column, Grid, to_rich
from ramgguf.sensitivity.result import Sensitivity

_NUMBERS = ("tensors", "median α", "least", "most", "error", "per weight")


def sensitivity_grid(found: Sensitivity) -> Grid:
    """Return per role: tensors, median and range of α, its error, and the median per weight.

    The last column is in relation to the median over all weights' tensors.
    """
    overall = float(np.median([t.alpha / t.n_weights for t in found.tensors]))
    rows = []
    for role in dict.fromkeys(t.role for t in found.tensors):
        members = [t for t in found.tensors if t.role == role]
        alpha = np.array([t.alpha for t in members])
        per_weight = float(np.median([t.alpha / t.n_weights for t in members]))
        error = float(np.median([t.relative_error for t in members]))
        rows.append(
            (
                role,
                str(len(members)),
                f"{np.median(alpha):.3g}",
                f"{alpha.min():.3g}",
                f"{alpha.max():.3g}",
                f"{error:.0%}",
                f"{per_weight / overall:.2f} ×" if overall else "–",
            )
        )
    return Grid("", (Column("role", number=False), *map(Column, _NUMBERS)), tuple(rows))


def remarks(found: Sensitivity) -> list[str]:
    """Return how it was measured and what stands out."""
    tokens = found.tokens
    n_measured = sum(t.origin == "measured" for t in found.tensors)
    told = (
        f"{tokens.n_tokens} tokens ({tokens.text or tokens.kind}, seed {tokens.seed}), "
        f"{n_measured} of {len(found.tensors)} tensors measured in {format_seconds(found.seconds)}"
    )
    return [told, *(f"note: {note}" for note in found.notes)]


def print_sensitivity(found: Sensitivity, console: Console, *, verbose: bool) -> None:
    """Print the table, how it was measured and what stands out; with verbose every tensor."""
    console.print(to_rich(sensitivity_grid(found), header_style="bold"))
    for line in remarks(found):
        console.print(line, markup=False)
    if verbose:
        for t in found.tensors:
            console.print(f"  {t.name:<40} {t.alpha:9.4g} ± {t.relative_error:.0%}  {t.origin}")
