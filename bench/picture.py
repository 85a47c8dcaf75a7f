"""The README's picture: KLD against file size, llama.cpp's files and ramgguf's, from bench/results.

    python bench/picture.py --out docs/quality.svg

Every point is a row of bench/effort.py, the latest of its kind: the mean KLD over windows of 512
tokens in five domains, which nothing else has read; bars are 95 % intervals by bootstrap over
windows, within domains.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from effort import BASE, FLAGS, MIXES
from paired import Row, read_rows
from ramgguf.evaluate.held_out import resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_CTX = 512
RESULTS = ("effort_scales.jsonl", "effort_no_scales.jsonl")


@dataclass(frozen=True)
class Series:
    """Which contender is drawn, under which name, how."""

    contender: str
    label: str
    colour: str
    marker: str


SERIES = (
    Series("mix", "llama.cpp's mix", "#b5b5b5", "s"),
    Series(BASE, "llama.cpp's mix with a matrix", "#6b6b6b", "s"),
    Series(FLAGS, "llama.cpp's best flags with it", "#d9822b", "^"),
    Series("auto", "ramgguf quantize", "#3b75af", "o"),
    Series("best", "ramgguf quantize --effort best", "#2a8f5d", "v"),
)
TITLES = {
    "smol135d-f16": "SmolLM2-135M",
    "qwen05d-f16": "Qwen2.5-Coder-0.5B",
    "smol768-f16": "SmolLM2-135M widened, no scales",
}


def interval(row: Row) -> tuple[float, float]:
    """Return how far the 95 % interval reaches below and above the mean KLD."""
    counts = resamples(row["domains"])
    kld = np.array(row["kld"])
    low, high = np.quantile(counts @ kld / counts.sum(axis=1), (0.025, 0.975))
    return float(kld.mean() - low), float(high - kld.mean())


def draw_model(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw a model's rows: a line per contender."""
    for series in SERIES:
        points = sorted(
            (r for r in rows if r["contender"] == series.contender), key=lambda r: r["n_bytes"]
        )
        if not points:
            continue
        axes.errorbar(
            [r["n_bytes"] / 1e6 for r in points],
            [np.mean(r["kld"]) for r in points],
            yerr=np.array([interval(r) for r in points]).T,
            label=series.label,
            color=series.colour,
            marker=series.marker,
            capsize=2,
            linewidth=1.4,
            markersize=5,
        )
    axes.set(xlabel="file, MB", yscale="log")
    axes.grid(which="both", linewidth=0.4, alpha=0.6)


def draw(rows: Sequence[Row], out: Path) -> None:
    """Write the picture: a panel per model."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "ramgguf"  # the same picture for the same rows
    figure, panels = plt.subplots(1, len(TITLES), figsize=(11, 3.8))
    for axes, (model, title) in zip(panels, TITLES.items(), strict=True):
        draw_model(axes, [r for r in rows if r["model"] == model])
        axes.set_title(title, fontsize=10)
    panels[0].set_ylabel("mean KLD to F16, nats per token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=len(labels), loc="lower center", bbox_to_anchor=(0.5, -0.08),
        frameon=False, fontsize=9,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    parser.add_argument("--out", type=Path, default=Path("docs/quality.svg"))
    arguments = parser.parse_args()
    rows = [
        row
        for name in RESULTS
        for row in read_rows(arguments.results / name, "model", "mix", "contender", "n_ctx")
        if row["n_ctx"] == N_CTX and row["mix"] in MIXES
    ]
    draw(rows, arguments.out)


if __name__ == "__main__":
    main()
