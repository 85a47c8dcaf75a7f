"""How fast the kernels are: per format, encoder and ISA level, next to ggml and to plain reading.

    python bench/kernels.py [--formats Q4_K,Q8_0] [--encoders rtn] [--isas v4,v3] [--runs 9]
                            [--sources F16,BF16,F32] [--log2-weights 24]

Time is the CPU time of one thread, so that other processes on the machine count less. For `rtn` the
weights are 2^24, many times the second cache, unless --log2-weights says otherwise; `search` and
ggml are slower by so much that fewer do. A line is the median of the runs, with quartiles and the
best. `read` is an OR of the same bytes by numpy in the same run. Lines are added to
bench/results/kernels.jsonl.
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.version import __version__
from ramgguf.llama.system import cpu_name
from ramgguf.quants import formats
from ramgguf.report.tensor_types import NEEDING_IMATRIX

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
ROW = 2048
LINEAR = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
N_WEIGHTS = {"rtn": 1 << 24, "search": 1 << 19, "ggml": 1 << 15}


@dataclass(frozen=True)
class Line:
    """One measured figure; weights per second of one thread, and bytes read per second."""

    operation: str
    format: str
    source: str
    encoder: str
    isa: str
    weights_per_second: float
    quartiles: tuple[float, float]
    best: float
    source_gb_per_second: float
    relative_to_reading: float


def rates(work: Callable[[], object], n_weights: int, runs: int) -> list[float]:
    """Return weights per second of every run, sorted; one more run goes before and is dropped."""
    work()
    found = []
    for _ in range(runs):
        start = time.thread_time()
        work()
        found.append(n_weights / (time.thread_time() - start))
    return sorted(found)


def weights(n: int, source: str = "F16") -> NDArray[np.uint8]:
    """Return n Student-t weights as rows of the source format."""
    rng = np.random.default_rng(0)
    block = (rng.standard_t(5, min(n, 1 << 20)) * 0.02).astype(np.float32).reshape(-1, ROW)
    rows = np.empty((len(block), formats.row_bytes(source, ROW)), np.uint8)
    _core.encode(source, "F32", block.view(np.uint8), rows)
    return np.resize(rows, (n // ROW, rows.shape[1]))


def reading_rate(source: str) -> float:
    """Return weights per second of plain reading."""
    words = weights(N_WEIGHTS["rtn"], source).view(np.uint64)
    work = partial(np.bitwise_or.reduce, words, None)
    return statistics.median(rates(work, N_WEIGHTS["rtn"], 5))


def ggml_quantizer(name: str) -> Callable[[], object]:
    """Return a call of ggml_quantize_chunk on N_WEIGHTS["ggml"] floats."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    x = weights(N_WEIGHTS["ggml"]).view(np.float16).astype(np.float32)
    out = np.empty((x.shape[0], formats.row_bytes(name, ROW)), np.uint8)
    size = [ctypes.c_int64(0), ctypes.c_int64(x.shape[0]), ctypes.c_int64(ROW)]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, out)]
    # Without importance ggml aborts on some formats.
    alike = np.ones(ROW, np.float32) if name in NEEDING_IMATRIX else None
    importance = None if alike is None else ctypes.c_void_p(alike.ctypes.data)

    def call() -> object:
        result = lib.ggml_quantize_chunk(formats.get(name).type_id, *pointers, *size, importance)
        return x, out, alike, result

    return call


def line(
    operation: str, name: str, source: str, encoder: str, found: list[float], reading: float
) -> Line:
    """Return the figures of one list of sorted rates."""
    middle = statistics.median(found)
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (middle,) * 3
    isa = "ggml" if encoder == "ggml" else _core.isa()
    ratio = middle / reading
    gb = middle * formats.get(source).block_bytes / 1e9
    return Line(operation, name, source, encoder, isa, middle, (low, high), found[-1], gb, ratio)


def measure_level(
    args: argparse.Namespace, encoder: str, source: str, reading: float
) -> list[Line]:
    """Return the lines of one encoder and source at the active level."""
    n, found = N_WEIGHTS[encoder], []
    x = weights(n, source)
    for name in args.formats:
        out = np.empty((x.shape[0], formats.row_bytes(name, ROW)), np.uint8)
        measuring = partial(_core.measure, [name], source, x, encoder=encoder)
        encoding = partial(_core.encode, name, source, x, out, encoder=encoder)
        measured, encoded = (rates(w, n, args.runs) for w in (measuring, encoding))
        found.append(line("measure", name, source, encoder, measured, reading))
        found.append(line("encode", name, source, encoder, encoded, reading))
    if encoder == "rtn":
        together = rates(lambda: _core.measure(list(LINEAR), source, x), n, args.runs)
        found.append(line("measure", "ten linear", source, encoder, together, reading))
    return found


def show(found: Line) -> None:
    """Print one line of the table."""
    speed, ratio = found.weights_per_second / 1e9, found.relative_to_reading
    low, high = (q / 1e9 for q in found.quartiles)
    print(
        f"{found.isa:5} {found.encoder:7} {found.source:4} {found.format:10} {found.operation:8} "
        f"{speed:7.3f} G weights/s  ({low:.3f}–{high:.3f}, best {found.best / 1e9:.3f})  "
        f"{found.source_gb_per_second:6.2f} GB/s  {ratio:5.1%} of reading",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sources = ("F16", "BF16", "F32")
    names = {"formats": formats.quantized(), "encoders": ("rtn", "search"), "sources": sources}
    for option, default in (*names.items(), ("isas", tuple(_core.supported_isas()))):
        parser.add_argument(f"--{option}", type=lambda s: tuple(s.split(",")), default=default)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--log2-weights", type=int, default=24, help="for rtn")
    args = parser.parse_args()
    N_WEIGHTS["rtn"] = 1 << args.log2_weights
    reading = {source: reading_rate(source) for source in args.sources}
    lines = [line("read", s, s, "numpy", [rate], rate) for s, rate in reading.items()]
    for found_line in lines:
        show(found_line)
    for name in args.formats:
        found = rates(ggml_quantizer(name), N_WEIGHTS["ggml"], min(args.runs, 5))
        lines.append(line("encode", name, "F32", "ggml", found, next(iter(reading.values()))))
        show(lines[-1])
    for isa, encoder, source in product(args.isas, args.encoders, args.sources):
        if encoder == "search" and source != args.sources[0]:
            continue  # it does not notice
        _core.set_isa(isa)
        for found_line in measure_level(args, encoder, source, reading[source]):
            lines.append(found_line)
            show(found_line)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {
        "machine": f"{cpu_name()}, {platform.platform()}",
        "commit": commit,
        "command": f"bench/kernels.py --runs {args.runs} --log2-weights {args.log2_weights}",
        "versions": {"ramgguf": __version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps({**asdict(found), **about}) + "\n" for found in lines)


if __name__ == "__main__":
    main()
