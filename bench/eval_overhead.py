"""What scoring costs on top of llama_decode: wall time, and peak memory of the engine's process.

    python bench/eval_overhead.py model.gguf --reference reference.gguf

Time: the parent's wall time of a sequence over the seconds that its models spent in llama_decode,
in the same run. Memory: the child's peak resident set after scoring, over its peak after the same
chunks were decoded without any scoring (models, contexts, buffers, interpreter).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from provenance import provenance
from ramgguf.core.corpus import default_corpus
from ramgguf.llama.client import Engine

_DECODE_ONLY = """
import sys
from pathlib import Path
import numpy as np
from ramgguf.llama import worker
from ramgguf.llama.model import LlamaModel
paths, n_ctx, n_threads, safe = sys.argv[4:], int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
models = [LlamaModel(Path(p), n_ctx=n_ctx, n_threads=n_threads, safe_kernels=safe) for p in paths]
ids = np.arange(n_ctx) % 250 + 3
for start, end in models[0].chunks(n_ctx):
    for model in models:
        model.decode(ids[start:end])
print(Path("/proc/self/status").read_text())
"""


def peak_bytes(status: str) -> int:
    """Return the peak resident set that a /proc/PID/status tells."""
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def decode_only_peak(models: list[Path], n_ctx: int, n_threads: int, safe: bool) -> int:
    """Return the peak resident set of a process that decodes one sequence and scores nothing."""
    arguments = [str(n_ctx), str(n_threads), str(int(safe)), *map(str, models)]
    done = subprocess.run(
        [sys.executable, "-c", _DECODE_ONLY, *arguments], capture_output=True, text=True, check=True
    )
    return peak_bytes(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--n-seq", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--safe-kernels", action="store_true")
    options = parser.parse_args()
    models = [options.reference, options.model] if options.reference else [options.model]
    ratios = []
    with Engine(
        models,
        n_ctx=options.seq_len,
        n_threads=options.threads,
        safe_kernels=options.safe_kernels,
    ) as engine:
        ids, _ = engine.tokenize(default_corpus().text[: 16 * options.seq_len], add_special=False)
        ids = np.resize(ids, options.seq_len)
        for index in range(options.n_seq):
            start = time.perf_counter()
            scored = list(engine.score(index, ids, 1, has_reference=options.reference is not None))
            seconds = time.perf_counter() - start
            ratios.append(seconds / sum(s.decode_seconds for s in scored))
        peak = peak_bytes(Path(f"/proc/{engine.pid}/status").read_text())
        n_vocab = engine.opened.models[0].vocab.n_tokens
        build = engine.opened.system.build
    alone = decode_only_peak(models, options.seq_len, options.threads, options.safe_kernels)
    print(
        json.dumps(
            {
                "bench": "eval_overhead",
                **provenance(),
                "llama_cpp": build,
                "models": [m.name for m in models],
                "n_vocab": n_vocab,
                "seq_len": options.seq_len,
                "threads": options.threads,
                "safe_kernels": options.safe_kernels,
                "wall_over_decode": [round(r, 4) for r in ratios],
                "median_wall_over_decode": round(statistics.median(ratios), 4),
                "peak_mb": round(peak / 1e6, 1),
                "peak_mb_decode_only": round(alone / 1e6, 1),
                "extra_mb": round((peak - alone) / 1e6, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
