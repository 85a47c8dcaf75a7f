"""What the same bytes on every CPU cost: kernels without and with fused multiply-adds.

    python bench/contraction.py OFF/_core.so FAST/_core.so

The second extension is built like the first, but for `-ffp-contract=fast` in CMakeLists.txt (one
level is enough: -DRAMGGUF_ISAS=v4). Each is loaded in processes of its own, which take turns; a
figure is the ratio of the medians of their best CPU times over 2^18 Gaussian weights of F16, which
stay in the second cache. Appends to bench/results/contraction.jsonl.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "contraction.jsonl"
N_WEIGHTS, ROW, N_BEST = 1 << 18, 2048, 5


def loaded(path: Path) -> Any:
    """Return the extension of that file; another that is loaded would be taken for it."""
    if "ramgguf._core" in sys.modules:
        raise SystemExit("an extension is loaded already")
    spec = importlib.util.spec_from_file_location("ramgguf._core", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(core: Any) -> dict[str, float]:
    """Return the best CPU time of each format and kind of work."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N_WEIGHTS // ROW, ROW)).astype(np.float16).view(np.uint8)
    importance = rng.uniform(0.1, 10, ROW).astype(np.float32)
    ways: dict[str, dict[str, Any]] = {
        "rtn": {"encoder": "rtn"},
        "search": {"encoder": "search"},
        "search with importance": {"encoder": "search", "importance": importance},
    }
    found = {}
    for f in core.formats():
        if not f.encodable or f.block_size == 1:
            continue
        out = np.empty((len(x), ROW // f.block_size * f.block_bytes), np.uint8)
        for name, way in ways.items():
            for kind in ("measure", "encode"):
                times = []
                for _ in range(N_BEST):
                    start = time.thread_time()
                    if kind == "measure":
                        core.measure([f.name], "F16", x, **way)
                    else:
                        core.encode(f.name, "F16", x, out, **way)
                    times.append(time.thread_time() - start)
                found[f"{f.name} {kind} {name}"] = min(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("off", type=Path)
    parser.add_argument("fast", type=Path, nargs="?", help="without it, print the times of one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--isa", default="v4")
    arguments = parser.parse_args()
    if arguments.fast is None:
        core = loaded(arguments.off)
        core.set_isa(arguments.isa)
        print(json.dumps(seconds(core)))
        return
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(arguments.rounds):
        for way in ("off", "fast"):
            command = [
                sys.executable,
                __file__,
                str(getattr(arguments, way)),
                "--isa",
                arguments.isa,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for what, value in json.loads(done.stdout).items():
                times[what][way].append(value)
    from provenance import provenance  # which loads the package's own extension

    with RESULTS.open("a") as out:
        for what, both in times.items():
            ratio = statistics.median(both["off"]) / statistics.median(both["fast"])
            row = {"what": what, "ratio": round(ratio, 3), "rounds": arguments.rounds}
            out.write(json.dumps({**row, **provenance()}) + "\n")
            print(f"{what}: {ratio:.2f}")


if __name__ == "__main__":
    main()
