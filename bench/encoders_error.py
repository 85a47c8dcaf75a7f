"""How near the encoders come to the weights, next to ggml's own encoder, and how fast.

For every format: the squared error of `rtn` and `search` as a share of ggml's, without an
importance matrix (plain) and with one (weighted), on Gaussian and Student-t weights and, given a
model, on a sample of its tensors; and weights/s of search next to ggml_quantize_chunk, in CPU time
of one thread (other processes on the machine count less), alternating, median of --runs.
Lines are added to bench/results/encoders.jsonl.

    python bench/encoders_error.py [MODEL.gguf] [--formats Q4_K,Q6_K] [--isa v3]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.version import __version__
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.system import cpu_name
from ramgguf.quants import formats

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import ggml_oracle

RESULTS = Path(__file__).parent / "results" / "encoders.jsonl"

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    """One format on one kind of weights; ratios are squared errors over ggml's."""

    format: str
    weights: str
    isa: str
    rtn_plain: float
    search_plain: float
    search_weighted: float
    ggml_nmse: float
    search_mweights_per_s: float
    ggml_mweights_per_s: float
    speed_ratio: float
    speed_ratio_quartiles: tuple[float, float]
    cpu: str = cpu_name()
    ramgguf_version: str = __version__


def encode(name: str, x: Floats, encoder: str, importance: Floats | None = None) -> Bytes:
    """Return the blocks that our encoder makes."""
    out = np.zeros((x.shape[0], formats.row_bytes(name, x.shape[1])), np.uint8)
    _core.encode(name, "F32", x.view(np.uint8), out, encoder=encoder, importance=importance)
    return out


def squared_error(name: str, x: Floats, blocks: Bytes, importance: Floats | None = None) -> float:
    """Return the sum of squared errors of the blocks, weighted if there is importance."""
    (error,) = _core.compare("F32", x.view(np.uint8), name, blocks, importance=importance).errors
    return error.sum_squared_error if importance is None else error.weighted_squared_error


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of the work."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def samples(model: Path | None, n_rows: int) -> dict[str, Floats]:
    """Return weights by their kind."""
    rng = np.random.default_rng(1)
    found = {
        "gaussian": rng.standard_normal((n_rows, 1536)).astype(np.float32),
        "student_t(4)": rng.standard_t(4, (n_rows, 1536)).astype(np.float32),
    }
    if model is None:
        return found
    with open_gguf(model) as file:
        chosen = [t for t in file.tensors if len(t.shape) == 2 and t.type_name == "F16"]
        step = max(1, len(chosen) // 12)
        # All of one length, as one sample: every twelfth or so of the model's matrices.
        parts = [
            file.read_rows(t, 0, min(t.n_rows, 64)).view(np.float16).astype(np.float32).reshape(-1)
            for t in chosen[::step]
        ]
    flat = np.concatenate(parts)
    found[model.stem] = np.ascontiguousarray(flat[: flat.size // 1536 * 1536].reshape(-1, 1536))
    return found


def measure(name: str, kind: str, x: Floats, runs: int) -> Row:
    """Return the figures of one format on one sample."""
    importance = np.exp(np.random.default_rng(2).standard_normal(x.shape[1])).astype(np.float32)
    ggml_blocks = ggml_oracle.quantize(name, x)
    ggml = squared_error(name, x, ggml_blocks)
    ggml_weighted = squared_error(name, x, ggml_oracle.quantize(name, x, importance), importance)
    search = encode(name, x, "search")
    part = x[: max(1, len(x) // 8)]
    times = [
        (
            seconds(lambda: _core.encode(name, "F32", x.view(np.uint8), search, encoder="search")),
            seconds(lambda: ggml_oracle.quantize(name, part)) * len(x) / len(part),
        )
        for _ in range(runs)
    ]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    low, ratio, high = statistics.quantiles((b / a for a, b in times), n=4)
    return Row(
        format=name,
        weights=kind,
        isa=_core.isa(),
        rtn_plain=squared_error(name, x, encode(name, x, "rtn")) / ggml,
        search_plain=squared_error(name, x, search) / ggml,
        search_weighted=squared_error(name, x, encode(name, x, "search", importance), importance)
        / ggml_weighted,
        ggml_nmse=ggml / float((x.astype(np.float64) ** 2).sum()),
        search_mweights_per_s=x.size / ours / 1e6,
        ggml_mweights_per_s=x.size / theirs / 1e6,
        speed_ratio=ratio,
        speed_ratio_quartiles=(low, high),
    )


def main() -> None:
    """Print the table, and write the rows as JSON lines if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--formats", default=",".join(formats.quantized()))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--isa", default="")
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    _core.set_isa(arguments.isa)
    print("squared error as a share of ggml's; M weights/s on one thread")
    print(
        f"{'format':8}{'weights':18}{'rtn':>8}{'search':>8}{'imatrix':>8}"
        f"{'search/s':>10}{'ggml/s':>8}{'speed':>8}"
    )
    rows = []
    for name in arguments.formats.split(","):
        for kind, x in samples(arguments.model, arguments.rows).items():
            row = measure(name, kind, x, arguments.runs)
            rows.append(row)
            print(
                f"{name:8}{kind:18}{row.rtn_plain:8.4f}{row.search_plain:8.4f}"
                f"{row.search_weighted:8.4f}{row.search_mweights_per_s:10.1f}"
                f"{row.ggml_mweights_per_s:8.1f}{row.speed_ratio:7.1f}x",
                flush=True,
            )
    with arguments.json.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


if __name__ == "__main__":
    main()
