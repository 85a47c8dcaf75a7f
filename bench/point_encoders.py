"""Encoders of formats of points beside libggml's: speed, and error weighted by importance.

    python bench/point_encoders.py models/smol768-f16.gguf --imatrix I.gguf [--runs 7]

Rows of every tensor with an entry in the matrix whose rows are whole superblocks (--rows of each,
spread evenly), and made-up ones: Gaussian, Student-t (4) and Laplace weights with log-normal
importance. Both encoders get the same importance. The error is Σ w(x−q)² / Σ w x². Speed is
that of one thread's CPU time, the two encoders in turn on the same rows. Appends a line per format
to bench/results/point_encoders.jsonl.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from provenance import provenance
from ramgguf import _core
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.imatrix import load_imatrix

RESULTS = Path(__file__).parent / "results" / "point_encoders.jsonl"
FORMATS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")
COLUMNS = 2048

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]


def samples(model: Path, imatrix: Path, n_rows: int) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield the name, rows and importance of every tensor that suits, then of made-up weights."""
    matrix = load_imatrix(imatrix)
    with open_gguf(model) as file:
        for tensor in file.tensors:
            weights = matrix.importance(tensor.name, tensor.shape)
            if weights is None or tensor.row_length % 256 or len(weights) > 1:
                continue
            picked = np.linspace(0, tensor.n_rows - 1, min(n_rows, tensor.n_rows)).astype(int)
            rows = np.concatenate([file.read_rows(tensor, i, i + 1) for i in picked.tolist()])
            x = decode_rows(tensor.type_name, rows, tensor.row_length)
            yield tensor.name, x, np.ascontiguousarray(weights[0])
    rng = np.random.default_rng(0)
    importance = np.exp(1.5 * rng.standard_normal(COLUMNS)).astype(np.float32)
    shape = (n_rows, COLUMNS)
    made = {
        "gaussian": rng.standard_normal(shape),
        "student_t": rng.standard_t(4, shape),
        "laplace": rng.laplace(size=shape),
    }
    for name, values in made.items():
        yield name, values.astype(np.float32), importance


def ours(name: str, x: Floats, importance: Floats) -> Blocks:
    """Return the blocks of `search`."""
    blocks = np.empty((len(x), formats.row_bytes(name, x.shape[1])), np.uint8)
    raw = x.view(np.uint8)
    _core.encode(name, "F32", raw, blocks, encoder="search", importance=importance)
    return blocks


def error(name: str, x: Floats, importance: Floats, blocks: Blocks) -> float:
    """Return the weighted error of blocks as a share of the weights' squares."""
    x64 = x.astype(np.float64)
    squares = (x64 - decode_rows(name, blocks, x.shape[1])) ** 2 @ importance
    return float(squares.sum() / (x64**2 @ importance).sum())


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of one call."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def measured(name: str, rows: list[tuple[str, Floats, Floats]], runs: int) -> dict[str, Any]:
    """Return the line of a format."""
    ratios = {
        label: error(name, x, w, ours(name, x, w)) / error(name, x, w, libggml.encode(name, x, w))
        for label, x, w in rows
    }
    _, x, w = next(row for row in rows if row[0] == "gaussian")
    pair = (partial(ours, name, x, w), partial(libggml.encode, name, x, w))
    times = [[seconds(work) for work in pair] for _ in range(runs)]
    speeds = [[x.size / t for t in of_one] for of_one in zip(*times, strict=True)]
    faster = sorted(t[1] / t[0] for t in times)
    return {
        "format": name,
        "isa": _core.isa(),
        "weights_per_second": statistics.median(speeds[0]),
        "libggml_weights_per_second": statistics.median(speeds[1]),
        "times_as_fast": statistics.median(faster),
        "times_as_fast_range": (faster[0], faster[-1]),
        "error_ratio": statistics.median(ratios.values()),
        "worst_error_ratio": max(ratios.values()),
        "n_samples": len(ratios),
        "made_up": {label: ratios[label] for label in ("gaussian", "student_t", "laplace")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    rows = list(samples(arguments.model, arguments.imatrix, arguments.rows))
    about = {"model": arguments.model.stem, **provenance()}
    with RESULTS.open("a") as out:
        for name in arguments.formats:
            line = measured(name, rows, arguments.runs) | about
            out.write(json.dumps(line) + "\n")
            print(
                f"{name:8} {line['weights_per_second'] / 1e6:6.1f} M weights/s, "
                f"{line['times_as_fast']:.1f} x libggml; weighted error "
                f"{line['error_ratio']:.3f} of libggml's, at most {line['worst_error_ratio']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
