"""How much of the inputs' loss a correction wins back on other tokens than its own, by ridge.

    python bench/correction_ridge.py models/smol135d-f16.gguf small.gguf --layers 6

small.gguf is a quantized file of the model, which gives the formats; weights are rounded layer by
layer for their quantized inputs (ramgguf/quants/correction.py), with Hessians from the same tokens.
At each input, the correction by one half of the tokens is tried on the other half, and the other
way round, with each ridge (a share of the mean of Σx̂x̂ᵀ's diagonal). The gain is the share of
Σ‖W(x − x̂)‖² that goes away: with all of the correction, with half of it, and with the share that
is best there. Prints medians over layers, for each place; a row of results holds all of them.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import ramgguf
from provenance import provenance
from ramgguf.core.parallel import default_threads
from ramgguf.gguf.architecture import parse_name
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.layer_rounding import LayerRounding
from ramgguf.quants import correction
from ramgguf.quants.correction import ChangedInputs
from ramgguf.quants.encoders import gptq
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.imatrix import load_imatrix
from rounded import layer_matrices

RESULTS = Path(__file__).parent / "results" / "correction_ridge.jsonl"
RIDGES = (0.01, 0.1, 0.3, 1.0, 3.0)
N_ROWS = 256  # of a weight
Floats = NDArray[np.float32]


def gains(changed: ChangedInputs, lost: Sequence[Floats], weights: Floats) -> dict[str, Any]:
    """Return for each ridge the gain with all, half and the best share, and that share.

    lost are the means of (x − x̂)(x − x̂)ᵀ in the halves.
    """
    found: dict[str, Any] = {}
    before = sum(float(np.vdot(weights @ one, weights)) for one in lost)
    for ridge in RIDGES:
        with patch.object(correction, "RIDGE", ridge):
            helps, costs = changed.tried(weights)
        share = max(0.0, helps / costs) if costs > 0 else 0.0

        def gain(s: float, helps: float = helps, costs: float = costs) -> float:
            return round((2 * s * helps - s * s * costs) / before, 4)

        found[f"{ridge:g}"] = [gain(1), gain(0.5), gain(share), round(share, 3)]
    return found


class Tried(LayerRounding):
    """A rounding that tries its corrections at each input."""

    rows: list[dict[str, Any]]

    def _changed(self, name: str, of_model: Floats) -> ChangedInputs:
        losses: list[Floats] = []

        def added(sums: correction.InputSums, half: int, x: Floats, x_hat: Floats) -> None:
            difference = x - x_hat
            if len(losses) <= half:
                losses.append(np.zeros((x.shape[1], x.shape[1]), np.float32))
            losses[half] += difference.T @ difference
            original(sums, half, x, x_hat)

        original = correction.InputSums.add
        with patch.object(correction.InputSums, "add", added):
            changed = super()._changed(name, of_model)
        lost = [one / np.float32(n) for one, n in zip(losses, changed.n_tokens, strict=True)]
        tensor = self._source.tensor(name)
        rows = self._source.read_rows(tensor, 0, min(N_ROWS, tensor.n_rows))
        weights = decode_rows(tensor.type_name, rows, tensor.row_length)
        self.rows.append({"name": name, "gains": gains(changed, lost, weights)})
        print(self.rows[-1], flush=True)
        return changed


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print the medians of each place over its layers."""
    print("| place | " + " | ".join(f"ridge {r:g}" for r in RIDGES) + " |")
    for part in dict.fromkeys(parse_name(row["name"]).part for row in rows):
        own = [row["gains"] for row in rows if parse_name(row["name"]).part == part]
        cells = []
        for ridge in RIDGES:
            whole, half, best, share = np.median([g[f"{ridge:g}"] for g in own], axis=0)
            cells.append(f"{whole:+.2f}, {half:+.2f}; {best:.2f} at {share:.2f}")
        print(f"| {part} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--layers", type=int, default=6, help="from the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.source.parent) as folder:
        scratch = Path(folder)
        matrix, hessian, copy = (scratch / name for name in ("m.gguf", "h.gguf", "small.gguf"))
        ramgguf.calibrate(
            options.source, matrix, tokens="mix", n_sequences=options.sequences, hessian=hessian
        )
        shutil.copy(options.small, copy)
        with open_gguf(options.source) as source, open_gguf(copy) as quantized:
            names = [
                n for n in layer_matrices(source) if quantized.tensor(n).type_name in gptq.FORMATS
            ]
            with Tried(
                source, quantized, scratch, names, encoder_name="gptq",
                imatrix=load_imatrix(matrix, hessian), tokens="mix",
                n_sequences=options.sequences, n_ctx=512, threads=default_threads(),
            ) as rounding:  # fmt: skip
                rounding.rows = []
                for layer in range(min(options.layers, rounding.n_layers)):
                    rounding.round(layer)
    table(rounding.rows)
    with RESULTS.open("a") as out:
        row = {
            "model": options.source.stem,
            "small": options.small.name,
            "n_sequences": options.sequences,
            "inputs": rounding.rows,
            **provenance(),
        }
        out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
