"""How fast the kernels are: per format, encoder and ISA level, next to ggml and to plain reading.

    python bench/kernels.py [--formats Q4_K,Q8_0] [--encoders rtn] [--isas v4,v3] [--runs 9]

Time is the CPU time of one thread, so that other processes on the machine count less; weights are
F16 and do not fit the second cache. A line is the median of the runs, with quartiles and the best.
`read` is a sum over the same bytes by numpy in the same run. Lines are added to
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
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core, formats
from ramgguf.engine.system import cpu_name
from ramgguf.version import __version__

RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
ROW = 2048
LINEAR = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
N_WEIGHTS = {"rtn": 1 << 23, "search": 1 << 19, "ggml": 1 << 15}


@dataclass(frozen=True)
class Line:
    """One measured figure; weights per second of one thread, and bytes read per second."""

    operation: str
    format: str
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


def weights(n: int) -> NDArray[np.uint8]:
    """Return n Student-t weights as rows of F16."""
    rng = np.random.default_rng(0)
    block = (rng.standard_t(5, min(n, 1 << 20)) * 0.02).astype(np.float16)
    return np.resize(block, n).reshape(-1, ROW).view(np.uint8)


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

    def call() -> object:
        result = lib.ggml_quantize_chunk(formats.get(name).type_id, *pointers, *size, None)
        return x, out, result

    return call


def line(operation: str, name: str, encoder: str, found: list[float], reading: float) -> Line:
    """Return the figures of one list of sorted rates."""
    middle = statistics.median(found)
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (middle,) * 3
    isa = "ggml" if encoder == "ggml" else _core.isa()
    ratio = middle / reading
    return Line(operation, name, encoder, isa, middle, (low, high), found[-1], middle * 2e-9, ratio)


def measure_level(args: argparse.Namespace, encoder: str, reading: float) -> list[Line]:
    """Return the lines of one encoder at the active level."""
    x = weights(N_WEIGHTS[encoder])
    n, found = x.size // 2, []
    for name in args.formats:
        out = np.empty((x.shape[0], formats.row_bytes(name, ROW)), np.uint8)
        measuring = partial(_core.measure, [name], "F16", x, encoder=encoder)
        encoding = partial(_core.encode, name, "F16", x, out, encoder=encoder)
        measured, encoded = (rates(w, n, args.runs) for w in (measuring, encoding))
        found.append(line("measure", name, encoder, measured, reading))
        found.append(line("encode", name, encoder, encoded, reading))
    if encoder == "rtn":
        together = rates(lambda: _core.measure(list(LINEAR), "F16", x), n, args.runs)
        found.append(line("measure", "ten linear", encoder, together, reading))
    return found


def show(found: Line) -> None:
    """Print one line of the table."""
    speed, ratio = found.weights_per_second / 1e9, found.relative_to_reading
    low, high = (q / 1e9 for q in found.quartiles)
    print(
        f"{found.isa:5} {found.encoder:7} {found.format:10} {found.operation:8} "
        f"{speed:7.3f} G weights/s  ({low:.3f}–{high:.3f}, best {found.best / 1e9:.3f})  "
        f"{found.source_gb_per_second:6.2f} GB/s  {ratio:5.1%} of reading",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = {"formats": formats.quantized(), "encoders": ("rtn", "search")}
    for option, default in (*names.items(), ("isas", tuple(_core.supported_isas()))):
        parser.add_argument(f"--{option}", type=lambda s: tuple(s.split(",")), default=default)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    x = weights(N_WEIGHTS["rtn"])
    words = x.view(np.uint64)
    reading = statistics.median(rates(lambda: np.bitwise_or.reduce(words, None), x.size // 2, 9))
    lines = [line("read", "F16", "numpy", [reading], reading)]
    for name in args.formats:
        found = rates(ggml_quantizer(name), N_WEIGHTS["ggml"], min(args.runs, 5))
        lines.append(line("encode", name, "ggml", found, reading))
        show(lines[-1])
    for isa in args.isas:
        _core.set_isa(isa)
        for encoder in args.encoders:
            for found_line in measure_level(args, encoder, reading):
                lines.append(found_line)
                show(found_line)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    about = {
        "machine": f"{cpu_name()}, {platform.platform()}",
        "commit": commit,
        "command": f"bench/kernels.py --runs {args.runs}",
        "versions": {"ramgguf": __version__, "python": platform.python_version()},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.writelines(json.dumps({**asdict(found), **about}) + "\n" for found in lines)


if __name__ == "__main__":
    main()
