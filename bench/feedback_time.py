"""What error feedback costs: seconds and memory for the matrices of a model's layers.

    python bench/feedback_time.py qwen2-1.5B --format Q4_K --encoders gptq descent

Shapes are those of bench/random_models.py; no model is needed. For every shape of a matrix, some
rows (--rows) of Student-t weights are rounded under a Hessian of correlated inputs, in one thread;
CPU seconds grow with the rows, so those of the whole matrix, and of all layers, are calculated. The
root of the Hessian is taken once per input, as in a run; so is XᵀX of 24,576 tokens, calculated
from 512. The forward passes are not in it. Memory is the peak of numpy's arrays.
Prints a table and adds a row per encoder to bench/results/feedback_time.jsonl.
"""

import argparse
import json
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from provenance import provenance
from ramgguf.quants.encoders import ENCODERS
from ramgguf.quants.hessian import Hessian, add_grams, mirror
from random_models import SHAPES, Shape, tensors

RESULTS = Path(__file__).parent / "results" / "feedback_time.jsonl"
INPUTS = ("attn_q", "attn_output", "ffn_gate", "ffn_down")  # a weight for each input of a layer
TOGETHER, N_TOKENS = 512, 24576  # tokens whose XᵀX is taken at once, and in all

Floats = NDArray[np.float32]


def matrices(shape: Shape) -> tuple[Counter[tuple[int, int]], Counter[int]]:
    """Return how often a model has each matrix (rows, columns), and each input (columns)."""
    found, inputs = Counter[tuple[int, int]](), Counter[int]()
    for name, dims in tensors(shape):
        if name.startswith("blk.") and len(dims) == 2:
            found[dims[0], dims[1]] += 1
            inputs[dims[1]] += name.split(".")[2] in INPUTS
    return found, inputs


def gram(n: int, rng: np.random.Generator) -> tuple[Floats, float]:
    """Return XᵀX (n, n) of TOGETHER correlated inputs, and the CPU seconds that it takes."""
    mixing = rng.standard_normal((TOGETHER // 2, n), dtype=np.float32)
    x = rng.standard_normal((TOGETHER, TOGETHER // 2), dtype=np.float32) @ mixing
    found = np.zeros((n, n), np.float32)
    start = time.thread_time()
    add_grams([(x, found)], 1)
    seconds = time.thread_time() - start
    mirror(found)
    return found, seconds


@dataclass
class Costs:
    """CPU seconds of one thread for all layers, and the peak of arrays in bytes."""

    rounding: dict[str, float]
    roots: float = 0.0
    grams: float = 0.0
    peak: int = 0


def measured(shape: Shape, format_: str, encoders: Sequence[str], n_rows: int) -> Costs:
    """Return what rounding all layers costs, by encoder."""
    found, inputs = matrices(shape)
    rng, costs = np.random.default_rng(0), Costs(dict.fromkeys(encoders, 0.0))
    Hessian.of(gram(256, rng)[0], TOGETHER)  # what the first call imports is no cost of layers
    for n_columns, n_inputs in sorted(inputs.items()):
        tracemalloc.start()
        xx, seconds = gram(n_columns, rng)
        costs.grams += n_inputs * seconds * N_TOKENS / TOGETHER
        start = time.thread_time()
        hessian = Hessian.of(xx, TOGETHER)
        assert hessian.units
        costs.roots += n_inputs * (time.thread_time() - start)
        importance = np.ascontiguousarray(hessian.mean.diagonal())
        for (rows, columns), n in found.items():
            if columns != n_columns:
                continue
            some = min(n_rows, rows)
            w = rng.standard_t(5, (some, columns)).astype(np.float32)
            for name in encoders:
                encode = ENCODERS[name].encode_output
                assert encode is not None
                start = time.thread_time()
                encode(format_, w, hessian, importance)
                costs.rounding[name] += n * rows / some * (time.thread_time() - start)
        costs.peak = max(costs.peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--format", default="Q4_K")
    parser.add_argument("--encoders", nargs="+", choices=("gptq", "descent"), default=["gptq"])
    parser.add_argument("--rows", type=int, default=256, help="that are rounded of each shape")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    n_weights = sum(rows * columns * n for (rows, columns), n in matrices(shape)[0].items())
    with threadpool_limits(1, user_api="blas"):
        costs = measured(shape, options.format, options.encoders, options.rows)
    print(
        f"{options.shape}, {n_weights / 1e9:.2f} G weights in layers, {options.format}; seconds of "
        f"one thread: {costs.grams:.0f} for XᵀX of {N_TOKENS:,} tokens, {costs.roots:.0f} for "
        f"roots; arrays of {costs.peak / 1e9:.2f} GB"
    )
    for name, seconds in costs.rounding.items():
        each = (seconds + costs.roots) / n_weights * 1e9
        print(f"{name}: {seconds:.0f}; with roots {each:.0f} per billion weights")
        row = {
            "shape": options.shape,
            "n_weights": n_weights,
            "format": options.format,
            "encoder": name,
            "cpu_seconds": round(seconds, 1),
            "root_cpu_seconds": round(costs.roots, 1),
            "gram_cpu_seconds": round(costs.grams, 1),
            "n_tokens": N_TOKENS,
            "peak_bytes": costs.peak,
            "n_rows": options.rows,
            **provenance(),
        }
        with options.out.open("a") as out:
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
