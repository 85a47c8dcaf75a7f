"""What a second thread brings, and what many small tensors cost, stage by stage.

    python bench/threads.py [--folder /tmp] [--runs 5]

Models of the same number of random weights, in a few large tensors and in ever more, smaller ones,
are measured, encoded and verified with one thread and with two, the two taking turns, after a run
that is dropped. Seconds are medians. Appends to bench/results/threads.jsonl.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ramgguf
import random_models
from provenance import provenance
from ramgguf.schema import Encoder, Plan

RESULTS = Path(__file__).parent / "results" / "threads.jsonl"
# 294 matrices of 0.5 to 2 M weights in the layers; cut into slices, up to 18,816 tensors.
SHAPE = random_models.Shape(42, 1024, 2048, 16, 8, 64, 4096)
SLICES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Row:
    """A stage of one model: seconds with one and two threads, and nanoseconds per weight."""

    stage: str
    encoder: str
    n_tensors: int
    n_weights: int
    seconds_1: float
    seconds_2: float
    speedup: float
    ns_per_weight: float


def timed(source: Path, plan: Plan, encoder: Encoder, threads: int) -> dict[str, float]:
    """Return the seconds of each stage of one run."""
    start = time.perf_counter()
    ramgguf.measure(source, encoder=encoder, threads=threads)
    seconds = {"measure": time.perf_counter() - start}
    output = source.with_suffix(".out")
    made = ramgguf.quantize(source, None, output, from_plan=plan, threads=threads, force=True)
    return seconds | {name: made.seconds[name] for name in ("write", "verify")}


def rows(source: Path, encoder: Encoder, runs: int) -> list[Row]:
    measured = ramgguf.measure(source, encoder=encoder)
    start = time.perf_counter()
    plan = ramgguf.plan(measured, "5bpw")
    planning = time.perf_counter() - start
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(runs + 1):
        for threads in (1, 2):
            for name, took in timed(source, plan, encoder, threads).items():
                seconds[name, threads].append(took)
    found = []
    for stage in ("measure", "write", "verify"):
        one, two = (statistics.median(seconds[stage, n][1:]) for n in (1, 2))
        found.append((stage, one, two))
    found.append(("plan", planning, planning))
    n = measured.n_weights
    return [
        Row(stage, encoder, len(measured.tensors), n, one, two, one / two, 1e9 * one / n)
        for stage, one, two in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--encoders", default="rtn")
    parser.add_argument("--slices", default=",".join(map(str, SLICES)))
    arguments = parser.parse_args()
    encoders: list[Encoder] = [e for e in ("rtn", "search") if e in arguments.encoders]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, RESULTS.open("a") as out:
        for n_slices in map(int, arguments.slices.split(",")):
            shape = replace(SHAPE, n_slices=n_slices)
            source = random_models.write(Path(folder) / "random.gguf", shape)
            for encoder in encoders:
                for row in rows(source, encoder, arguments.runs):
                    print(row)
                    out.write(json.dumps(asdict(row) | provenance()) + "\n")
            source.unlink()


if __name__ == "__main__":
    main()
