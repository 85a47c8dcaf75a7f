"""The picture of bench/results/sensitivity.jsonl: how well Σ α · NMSE predicts KLD.

    python bench/sensitivity_picture.py

draws bench/results/calibration.svg and prints how far plans were from what was predicted.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from sensitivity_report import rows


def calibration() -> None:
    """Print how whole plans turned out beside what was predicted, by what they were made with."""
    of = {(str(r["part"]), str(r["name"])): r for r in rows()}
    for kind in ("sensitivity", "weighted", "nmse", "random"):
        found = [r for (part, name), r in of.items() if part == "plans" and name.startswith(kind)]
        if found:
            logs = np.log([float(str(r["kld"])) / float(str(r["predicted"])) for r in found])
            print(
                f"{kind}: {len(found)} plans, KLD ÷ prediction {np.exp(logs.mean()):.3f} "
                f"(log spread {logs.std(ddof=1) if len(logs) > 1 else math.nan:.3f}, "
                f"{np.exp(logs.min()):.3f} to {np.exp(logs.max()):.3f})"
            )


def picture(path: Path) -> None:
    """Draw the KLD of whole plans and uniform files over Σ α · NMSE, both logarithmic."""
    points = [r for r in rows() if r["part"] in ("plans", "kernels")]
    low, high, size, edge = -3.5, 1.0, 520, 60

    def at(value: object) -> float:
        return (math.log10(max(float(str(value)), 1e-9)) - low) / (high - low) * (size - 2 * edge)

    colors = {"sensitivity": "#1f5fa8", "weighted": "#2e8b57", "nmse": "#888", "random": "#c0392b"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<line x1="{edge}" y1="{size - edge}" x2="{size - edge}" y2="{edge}" stroke="#bbb"/>',
        '<g font-family="sans-serif" font-size="12">',
        f'<text x="{size / 2 - 80}" y="{size - 15}">Σ α · NMSE, nats per token</text>',
        f'<text x="15" y="{edge - 20}">KLD on WikiText-2, nats per token</text>',
    ]
    for exponent in (-3, -2, -1, 0):
        k = edge + at(10.0**exponent)
        parts.append(f'<text x="{k:.0f}" y="{size - edge + 16}">1e{exponent}</text>')
        parts.append(f'<text x="{edge - 34}" y="{size - k:.0f}">1e{exponent}</text>')
    for r in points:
        kind = str(r["name"]).split()[0]
        color = colors.get(kind, "#e08e0b")
        x, y = edge + at(r["predicted"]), size - edge - at(r["kld"])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}" opacity="0.8">')
        parts.append(f"<title>{r['part']}: {r['name']}</title></circle>")
    for k, (kind, color) in enumerate({**colors, "uniform, real kernels": "#e08e0b"}.items()):
        parts.append(f'<text x="{edge + 10}" y="{edge + 16 * k}" fill="{color}">{kind}</text>')
    path.write_text("\n".join([*parts, "</g></svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, default=Path("bench/results/calibration.svg"))
    picture(parser.parse_args().svg)
    calibration()


if __name__ == "__main__":
    main()
