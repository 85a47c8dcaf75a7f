"""The README's picture: KLD against file size, llama.cpp's files and ramgguf's, from bench/results.

    python bench/picture.py --results bench/results/quality.jsonl --out docs/quality.svg

Every point is a row of bench/quality.py; bars are 95 % intervals by bootstrap over sequences.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from quality import N_RESAMPLES, Row, read


@dataclass(frozen=True)
class Series:
    """Which contender is drawn, under which name, how."""

    contender: str
    label: str
    colour: str
    marker: str


SERIES = (
    Series("mix", "llama.cpp's mixes", "#8c8c8c", "s"),
    Series("best flags", "llama.cpp's best flags", "#d9822b", "^"),
    Series("weighted", "ramgguf quantize", "#3b75af", "o"),
    Series("sensitivity", "… --sensitivity FILE", "#1d3f66", "D"),
    Series("calibrated", "… --sensitivity FILE --calibrate self", "#2a8f5d", "v"),
)


def spread(row: Row) -> tuple[float, float]:
    """Return how far the 95 % interval reaches below and above the mean KLD."""
    draws = np.random.default_rng(0).integers(0, row.n_seq, (N_RESAMPLES, row.n_seq))
    low, high = np.quantile(row.per_token[1][draws].mean(1), (0.025, 0.975))
    return row.kld_mean - low, high - row.kld_mean


def draw(rows: Sequence[Row], model: str, out: Path) -> None:
    """Write the picture of the model's rows."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "ramgguf"  # the same picture for the same rows
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for series in SERIES:
        points = sorted(
            (r for r in rows if r.contender == series.contender and r.model == model),
            key=lambda r: r.n_bytes,
        )
        axes.errorbar(
            [r.n_bytes / 1e6 for r in points],
            [r.kld_mean for r in points],
            yerr=np.array([spread(r) for r in points]).reshape(-1, 2).T,
            label=series.label,
            color=series.colour,
            marker=series.marker,
            capsize=2,
            linewidth=1.4,
            markersize=5,
        )
    axes.set(xlabel="file, MB", ylabel="mean KLD to F16, nats per token", yscale="log")
    numbers = {r.n_seq for r in rows if r.model == model and not r.contender.startswith("random")}
    n_seq = " or ".join(str(n) for n in sorted(numbers))
    axes.set_title(f"{model.removesuffix('-f16')}, {n_seq} × 512 tokens of WikiText-2", fontsize=10)
    axes.grid(which="both", linewidth=0.4, alpha=0.6)
    axes.legend(frameon=False)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results/quality.jsonl"))
    parser.add_argument("--model", default="smol768-f16")
    parser.add_argument("--out", type=Path, default=Path("docs/quality.svg"))
    arguments = parser.parse_args()
    draw(read(arguments.results), arguments.model, arguments.out)


if __name__ == "__main__":
    main()
