"""What a second thread brings, and what many small tensors cost, stage by stage.

    python bench/threads.py [--folder /tmp] [--runs 5] [--shape experts]

Models of the same number of random weights, in a few large tensors and in ever more, smaller ones,
are measured, encoded and verified with one thread and with two, the two taking turns, after a run
that is dropped. `copy` is the least that `write` could be: the same bytes read and others written,
by the same number of threads in chunks of the same size, without a thought. Seconds are medians;
nanoseconds per weight are CPU time. Appends to bench/results/threads.jsonl.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ramgguf
import random_models
from provenance import provenance
from ramgguf.plan.result import Plan
from ramgguf.quants.encoders import EncoderName

RESULTS = Path(__file__).parent / "results" / "threads.jsonl"
# Each with the numbers of slices that it is cut into.
SHAPES: Mapping[str, tuple[random_models.Shape, tuple[int, ...]]] = {
    # 294 matrices of 0.5 to 2 M weights; cut, up to 18,816 tensors.
    "matrices": (random_models.Shape(42, 1024, 2048, 16, 8, 64, 4096), (1, 4, 16, 64)),
    # Experts of a sixth of those of a 30B-A3B, and as many of them: 10 GB.
    "experts": (random_models.Shape(48, 1024, 256, 16, 4, 64, 4096, n_experts=128), (1, 128)),
    # Four layers of a 30B-A3B.
    "layers": (random_models.Shape(4, 2048, 768, 32, 4, 128, 4096, n_experts=128), (1, 128)),
}
CHUNK_BYTES = 2 << 20  # 2^20 weights of BF16: what a thread takes at a time


@dataclass(frozen=True)
class Row:
    """A stage of one model: seconds with one and two threads, CPU nanoseconds per weight with one.

    write and verify are one figure of CPU time, in the row of write.
    """

    shape: str
    stage: str
    encoder: str
    n_tensors: int
    n_weights: int
    seconds_1: float
    seconds_2: float
    speedup: float
    ns_per_weight: float


@dataclass(frozen=True)
class Times:
    """Seconds of the clock and of the CPU."""

    wall: float
    cpu: float


def timed(source: Path, plan: Plan, encoder: EncoderName, threads: int) -> dict[str, Times]:
    """Return the times of each stage of one run."""
    wall, cpu = time.perf_counter(), time.process_time()
    ramgguf.measure(source, encoder=encoder, threads=threads)
    measured = Times(time.perf_counter() - wall, time.process_time() - cpu)
    output, cpu = source.with_suffix(".out"), time.process_time()
    made = ramgguf.quantize(source, None, output, from_plan=plan, threads=threads, force=True)
    cpu = time.process_time() - cpu
    return {
        "measure": measured,
        "write": Times(made.seconds["write"], cpu),
        "verify": Times(made.seconds["verify"], 0.0),
    }


def copy(source: Path, n_written: int, threads: int) -> float:
    """Return the seconds that reading the source and writing n_written bytes takes."""
    n_read = source.stat().st_size
    starts = range(0, n_read, CHUNK_BYTES)
    with source.open("rb") as file, source.with_suffix(".copy").open("w+b") as out:
        out.truncate(n_written)

        def move(start: int) -> None:
            chunk = os.pread(file.fileno(), CHUNK_BYTES, start)
            first, last = (at * n_written // n_read for at in (start, start + len(chunk)))
            os.pwrite(out.fileno(), memoryview(chunk)[: last - first], first)

        began = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(move, starts))
        took = time.perf_counter() - began
    source.with_suffix(".copy").unlink()
    return took


def rows(shape: str, source: Path, encoder: EncoderName, runs: int) -> list[Row]:
    measured = ramgguf.measure(source, encoder=encoder)
    n = measured.n_weights
    cpu = time.process_time()
    plan = ramgguf.plan(measured, "5bpw")
    planning = time.process_time() - cpu
    times: dict[tuple[str, int], list[Times]] = defaultdict(list)
    for _ in range(runs + 1):
        for threads in (1, 2):
            for name, took in timed(source, plan, encoder, threads).items():
                times[name, threads].append(took)
            cpu = time.process_time()
            seconds = copy(source, plan.n_bytes, threads)
            times["copy", threads].append(Times(seconds, time.process_time() - cpu))
    model = shape, encoder, len(measured.tensors), n
    found = [_row("plan", model, planning, planning, planning)]
    for stage in ("measure", "write", "verify", "copy"):
        one, two = (statistics.median(t.wall for t in times[stage, k][1:]) for k in (1, 2))
        spent = statistics.median(t.cpu for t in times[stage, 1][1:])
        found.append(_row(stage, model, one, two, spent))
    return found


def _row(
    stage: str, model: tuple[str, EncoderName, int, int], one: float, two: float, spent: float
) -> Row:
    shape, encoder, n_tensors, n = model
    return Row(shape, stage, encoder, n_tensors, n, one, two, one / two, 1e9 * spent / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--encoders", default="rtn")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="matrices")
    parser.add_argument("--slices", help="default: all of the shape's, such as 1,4,16,64")
    arguments = parser.parse_args()
    shape, slices = SHAPES[arguments.shape]
    if arguments.slices:
        slices = tuple(map(int, arguments.slices.split(",")))
    encoders: list[EncoderName] = [e for e in ("rtn", "search") if e in arguments.encoders]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, RESULTS.open("a") as out:
        for n_slices in slices:
            cut = replace(shape, n_slices=n_slices)
            source = random_models.write(Path(folder) / "random.gguf", cut)
            for encoder in encoders:
                for row in rows(arguments.shape, source, encoder, arguments.runs):
                    print(row)
                    out.write(
                        json.dumps(asdict(row) | provenance() | {"note": arguments.note}) + "\n"
                    )
            source.unlink()


if __name__ == "__main__":
    main()
