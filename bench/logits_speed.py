"""Logits per second of the C++ pass on one thread, at every ISA level, and its error.

    python bench/logits_speed.py

Seconds are the thread's CPU time, so a busy machine disturbs little. `compare` counts pairs of
logits, so it reads twice as many as it counts.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.special import logsumexp

from provenance import provenance
from ramgguf import _core

N_LOGITS = 16_000_000
N_RUNS = 7


def billions_per_second(work: Callable[[], object], n: int) -> list[float]:
    """Return n / seconds / 10⁹ of each run, after one to warm up."""
    work()
    speeds = []
    for _ in range(N_RUNS):
        start = time.thread_time()
        work()
        speeds.append(n / (time.thread_time() - start) / 1e9)
    return speeds


def main() -> None:
    rng = np.random.default_rng(0)
    for n_vocab in (32_000, 49_152, 151_936, 262_144):
        n_rows = N_LOGITS // n_vocab
        base = (rng.standard_normal((n_rows, n_vocab)) * 3).astype(np.float32)
        other = base + (rng.standard_normal((n_rows, n_vocab)) * 0.1).astype(np.float32)
        targets = rng.integers(0, n_vocab, n_rows).astype(np.int32)
        exact = logsumexp(base[:8].astype(np.float64), axis=1)
        error = np.abs(_core.score_logits(base[:8], targets[:8])["log_sum_exp"] - exact).max()
        for isa in _core.supported_isas():
            _core.set_isa(isa)
            score = billions_per_second(partial(_core.score_logits, base, targets), base.size)
            pairs = partial(_core.compare_logits, base, other, targets)
            compare = billions_per_second(pairs, base.size)
            row = {
                "bench": "logits_speed",
                **provenance(),
                "isa": isa,
                "n_vocab": n_vocab,
                "score_glogits_per_s": round(statistics.median(score), 3),
                "score_range": [round(min(score), 3), round(max(score), 3)],
                "compare_gpairs_per_s": round(statistics.median(compare), 3),
                "compare_range": [round(min(compare), 3), round(max(compare), 3)],
                "max_log_sum_exp_error": float(f"{error:.1e}"),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
