"""Sensitivities for the terminal: per role, with their spread over the layers."""

import numpy as np
from rich.console import Console
from rich.table import Table

from ramgguf.sensitivities import Sensitivity
from ramgguf.units import format_seconds


def sensitivity_table(found: Sensitivity) -> Table:
    """Return per role: tensors, median and range of α, its error, and the median per weight.

    The last column is in relation to the median over all weights' tensors.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("role")
    for column in ("tensors", "median α", "least", "most", "error", "per weight"):
        table.add_column(column, justify="right")
    overall = float(np.median([t.alpha / t.n_weights for t in found.tensors]))
    for role in dict.fromkeys(t.role for t in found.tensors):
        members = [t for t in found.tensors if t.role == role]
        alpha = np.array([t.alpha for t in members])
        per_weight = float(np.median([t.alpha / t.n_weights for t in members]))
        error = float(np.median([t.relative_error for t in members]))
        table.add_row(
            role,
            str(len(members)),
            f"{np.median(alpha):.3g}",
            f"{alpha.min():.3g}",
            f"{alpha.max():.3g}",
            f"{error:.0%}",
            f"{per_weight / overall:.2f} ×",
        )
    return table


def print_sensitivity(found: Sensitivity, console: Console, *, verbose: bool) -> None:
    """Print the table, how it was measured and what stands out; with verbose every tensor."""
    console.print(sensitivity_table(found))
    tokens = found.tokens
    console.print(
        f"{tokens.n_tokens} tokens ({tokens.text or tokens.kind}, seed {tokens.seed}), "
        f"{sum(t.origin == 'measured' for t in found.tensors)} of {len(found.tensors)} tensors "
        f"measured in {format_seconds(found.seconds)}"
    )
    for note in found.notes:
        console.print(f"note: {note}")
    if verbose:
        for t in found.tensors:
            console.print(f"  {t.name:<40} {t.alpha:9.4g} ± {t.relative_error:.0%}  {t.origin}")
