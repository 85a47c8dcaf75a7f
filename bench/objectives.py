"""Objectives at equal bytes: plans by priors, by measured sensitivities, and by both.

    python bench/objectives.py models/smol135d-f16.gguf --budgets 93510208 112103488 \\
        --imatrix I.gguf --scales S.gguf --sensitivity A.json

For each budget, a file is planned by each objective and written by the same encoder with the same
matrix (error feedback with --hessian). All are scored side by side on the mix's `gate` part. Rows
are added to bench/results/objectives.jsonl; `--table` prints KLDs and their ratios to `weighted`,
95 % intervals by bootstrap over windows, paired.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import ramgguf
from paired import Row, add_rows, domain_ratios, kld_ratio, read_rows, scored
from ramgguf.plan.objectives import DEFAULT_OBJECTIVE, MEASURED, OBJECTIVE_NAMES
from ramgguf.quants.encoders import ENCODERS

RESULTS = Path(__file__).parent / "results" / "objectives.jsonl"


def rows(options: argparse.Namespace, budget: int, folder: Path) -> list[Row]:
    """Return the row of each objective's file of so many bytes."""
    made: list[tuple[Row, Path]] = []
    for objective in options.objectives:
        path = folder / f"{objective}.gguf"
        ramgguf.quantize(
            options.source, budget, path, effort="fast", encoder=options.encoder,
            imatrix=options.imatrix, hessian=options.hessian, scales=options.scales,
            objective=objective, verify=False, force=True,
            sensitivity=options.sensitivity if objective in MEASURED else None,
        )  # fmt: skip
        row = {
            "model": options.source.stem,
            "budget": budget,
            "encoder": options.encoder,
            "objective": objective,
            "n_bytes": path.stat().st_size,
        }
        made.append((row, path))
    logits = folder / "logits"
    return scored(made, options.source, n_ctx=options.n_ctx, rounds=options.rounds, logits=logits)


def table(found: list[Row]) -> None:
    """Print a Markdown table of the rows."""
    print("| | objective | KLD | ratio | domains |")
    print("|---|---|---|---|---|")
    for row in found:
        base = next(
            r for r in found
            if r["objective"] == DEFAULT_OBJECTIVE
            and all(r[k] == row[k] for k in ("model", "budget", "encoder"))
        )  # fmt: skip
        value, low, high = kld_ratio(row["kld"], base["kld"], row["domains"])
        each = ", ".join(f"{r:.2f}" for r in domain_ratios(row, base).values())
        print(
            f"| {row['model']}, {row['budget'] / 1e6:.1f} MB, {row['encoder']} "
            f"| {row['objective']} | {np.mean(row['kld']):.5f} "
            f"| {value:.3f} ({low:.3f}–{high:.3f}) | {each} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--budgets", type=int, nargs="+", default=[])
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--hessian", type=Path)
    parser.add_argument("--scales", type=Path)
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--encoder", choices=list(ENCODERS), default="search")
    parser.add_argument(
        "--objectives", nargs="+", choices=OBJECTIVE_NAMES, default=[DEFAULT_OBJECTIVE, *MEASURED]
    )
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory(dir=options.source.parent) as folder:
            for budget in options.budgets:  # what the source says of the windows is kept for all
                add_rows(options.out, rows(options, budget, Path(folder)))
    table(read_rows(options.out, "model", "budget", "encoder", "objective"))


if __name__ == "__main__":
    main()
