"""How far encoders are from the rate–distortion bound of these weights under these Hessians.

    python bench/bound.py models/smol768-f16.gguf H.hessian.gguf --formats Q3_K Q4_K --layers 5

Distortion is the output error Σ eHeᵀ over Σ wHwᵀ, geometric mean over the matrices of some layers.
The bound is that of a Gaussian source with each row's variance, rows independent, inputs correlated
as H says, at the format's bits per weight: reverse water-filling over the eigenvalues of H times
the rows' variances (Cover & Thomas, Elements of Information Theory, 10.3.3). No quantizer of any
kind does better on such weights; real ones are not quite Gaussian. At high rates, scalar
quantization with entropy coding stays 1.53 dB above it, the E8 lattice 0.88 dB, the Leech lattice
0.50 dB (Conway & Sloane, Sphere Packings, table 2.3); 6.02 dB are a bit. Distances are in dB, and
in bits per weight. Rows are added to bench/results/bound.jsonl.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from provenance import provenance
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants import formats
from ramgguf.quants.encoders import descent, gptq, points
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian, Hessians, load_hessians
from rounded import in_threads, layer_matrices

Floats = NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "bound.jsonl"
ENCODERS = ("search", "gptq", "descent")
_STEPS = 60  # of bisection for the water level, in its logarithm


def bound(eigenvalues: NDArray[np.float64], variances: NDArray[np.float64], bits: float) -> float:
    """Return the least distortion, Σ over rows and inputs, at so many bits per weight.

    Components have variances eigenvalues (n) times variances (n_rows); each gets
    max(0, log₂(component / level) / 2) bits and leaves min(component, level).
    """
    components = np.outer(variances, eigenvalues).ravel()
    components = components[components > 0]
    asked = bits * len(variances) * len(eigenvalues)
    low, high = np.log(components.min()) - 40, np.log(components.max())
    for _ in range(_STEPS):
        level = (low + high) / 2
        spent = np.maximum(np.log(components) - level, 0).sum() / (2 * np.log(2))
        low, high = (level, high) if spent > asked else (low, level)
    return float(np.minimum(components, np.exp(level)).sum())


def encoded(encoder: str, type_name: str, rows: Floats, hessian: Hessian) -> NDArray[np.uint8]:
    """Return the blocks; scales weigh inputs by the diagonal of H."""
    importance = np.ascontiguousarray(hessian.mean.diagonal())
    if encoder == "search":
        return points.searched(type_name, rows, importance)
    encode = gptq.encode if encoder == "gptq" else descent.encode
    return encode(type_name, rows, hessian, importance)


def distances(
    source: GGUFFile, name: str, hessians: Hessians, wanted: Sequence[str]
) -> dict[tuple[str, str], float]:
    """Return the distortion of a matrix over its bound, by format and encoder."""
    tensor = source.tensor(name)
    rows = source.read_rows(tensor, 0, tensor.n_rows)
    w = decode_rows(tensor.type_name, rows, tensor.row_length)
    hessian = hessians.factored(name, tensor.row_length)
    eigenvalues = np.maximum(np.linalg.eigvalsh(hessian.mean.astype(np.float64)), 0)
    variances = (w.astype(np.float64) ** 2).mean(axis=1)
    found = {}
    for type_name in wanted:
        if not formats.suits(type_name, tensor.row_length):
            continue
        bits = 8 * formats.row_bytes(type_name, tensor.row_length) / tensor.row_length
        least = bound(eigenvalues, variances, bits)
        for encoder in ENCODERS:
            blocks = encoded(encoder, type_name, w, hessian)
            off = hessian.error(w - decode_rows(type_name, blocks, tensor.row_length))
            found[type_name, encoder] = off / least
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("hessian", type=Path)
    parser.add_argument("--formats", nargs="+", default=["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
    parser.add_argument("--layers", type=int, default=5, help="so many, from first to last")
    options = parser.parse_args()
    hessians = load_hessians(options.hessian)
    with open_gguf(options.source) as source:
        matrices = [name for name in layer_matrices(source) if hessians.owner(name)]
        last = max(layer_of(n) or 0 for n in matrices)
        chosen = set(np.linspace(0, last, options.layers).round().astype(int).tolist())
        matrices = [n for n in matrices if layer_of(n) in chosen]
        found = in_threads(lambda n: distances(source, n, hessians, options.formats), matrices)
    for type_name in options.formats:
        cells = []
        for encoder in ENCODERS:
            logs = [np.log(f[type_name, encoder]) for f in found if (type_name, encoder) in f]
            if not logs:
                continue
            decibels = 10 * np.mean(logs) / np.log(10)
            cells.append(f"{encoder} {decibels:.2f} dB, {decibels / 6.0206:.2f} bits")
            row = {"model": options.source.stem, "format": type_name, "encoder": encoder}
            row |= {"n_matrices": len(logs), "n_tokens": hessians.n_tokens}
            row |= {"above_bound_db": round(float(decibels), 3)}
            with RESULTS.open("a") as out:
                out.write(json.dumps(row | provenance()) + "\n")
        print(f"{type_name}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
