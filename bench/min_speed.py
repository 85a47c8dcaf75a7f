"""Is a plan that knows the speed of formats faster than one of bytes alone, of equal KLD?

    python bench/min_speed.py models/qwen05-f16.gguf --bpw 5.5 --folder models/min-speed

One file is planned by bytes. The other is the fastest plan whose predicted cost is no higher, its
bytes free: --min-speed is bisected for it (plans and files that are in the folder are taken as they
are). Both are scored against the source on the same held-out text. Where their measured KLD
differs by more than 2 %, the size of the plan by bytes is changed until it does not. Then they are
timed by `check` in turn, so that other load affects both. A row for both goes to
bench/results/min_speed.jsonl; speeds are medians over all repeats, their ratio is of each round.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import ramgguf
from provenance import provenance
from ramgguf.core.errors import BudgetError
from ramgguf.core.machine import available_memory
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.evaluate import HeldOutScore, score_held_out
from ramgguf.llama.system import system_info
from ramgguf.measure.result import Measurement
from ramgguf.plan import SpeedLimit
from ramgguf.plan.result import Plan
from ramgguf.quantize.speed_target import speed_limit

N_CTX = 128
EQUAL = 0.02  # KLDs that differ by less are called equal
KLD_PER_BIT = math.log(4)  # what a bit per weight takes from log KLD: a start, then a secant
STEPS = 4  # that the search for equal KLD takes, at most


def fastest_of_equal_cost(measurement: Measurement, plain: Plan, limit: SpeedLimit) -> Plan:
    """Return the plan of the highest speed whose cost is at most the plain plan's."""
    low, _ = limit.predicted((a.name, a.n_weights, a.format) for a in plain.assignments)
    best, high = plain, 2 * low
    for _ in range(9):
        middle = (low + high) / 2
        asked = SpeedLimit(limit.profile, limit.work, middle)
        try:
            made = ramgguf.plan(measurement, "1000%", speed=asked)
        except BudgetError:
            high = middle
            continue
        if made.total_cost <= plain.total_cost:
            best, low = made, middle
        else:
            high = middle
    return best


class Files:
    """Writes files of plans, and scores them on the same windows of held-out text."""

    def __init__(
        self, source: Path, folder: Path, measurement: Measurement, arguments: argparse.Namespace
    ) -> None:
        self._source, self._folder, self._measurement = source, folder, measurement
        self._imatrix, self._windows = arguments.imatrix, arguments.windows

    def scored(self, plan: Plan, name: str) -> tuple[Path, HeldOutScore]:
        """Return the plan's file, taken as it is if it is there, and its score."""
        path = self._folder / f"{self._source.stem}-{name}.gguf"
        if not path.exists() or path.stat().st_size != plan.n_bytes:
            ramgguf.quantize(
                self._source, None, path, from_plan=plan, imatrix=self._imatrix, force=True
            )
        (score,) = score_held_out(
            [path], self._source, seconds=None, max_rounds=self._windows, threads=2
        )
        print(f"{name}: {plan.n_bytes:,} bytes, KLD {score.overall().kld.value:.5f}", flush=True)
        return path, score

    def of_kld(self, bpw: float, kld: float) -> tuple[Plan, Path, HeldOutScore]:
        """Return the plan by bytes of nearly this KLD, its file and score; bpw is the first try."""
        tried: list[tuple[float, float]] = []
        for _ in range(STEPS):
            plan = ramgguf.plan(self._measurement, f"{bpw:.4f}bpw")
            path, score = self.scored(plan, f"{bpw:.4f}-bytes")
            tried.append((bpw, math.log(score.overall().kld.value / kld)))
            if abs(tried[-1][1]) < EQUAL:
                break
            slope = -KLD_PER_BIT
            if len(tried) > 1:
                (x0, y0), (x1, y1) = tried[-2:]
                slope = min((y1 - y0) / (x1 - x0), slope / 4)
            bpw -= tried[-1][1] / slope
        return plan, path, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--bpw", type=float, default=5.5)
    parser.add_argument("--folder", type=Path, default=Path("models/min-speed"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=2, help="of each domain that are scored")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/min_speed.jsonl"))
    arguments = parser.parse_args()
    folder, source = arguments.folder, arguments.source
    folder.mkdir(parents=True, exist_ok=True)
    measured = folder / f"{source.stem}{'-imatrix' * (arguments.imatrix is not None)}.rd.json"
    if not measured.exists():
        ramgguf.measure(source, imatrix=arguments.imatrix).save(measured)
    measurement = Measurement.load(measured)
    limit = speed_limit(source, 1e-9, 0.0, names=None, threads=arguments.threads, announce=print)
    files = Files(source, folder, measurement, arguments)
    plain = ramgguf.plan(measurement, f"{arguments.bpw}bpw")
    kept = folder / f"{source.stem}-{arguments.bpw}-speed.json"
    if not kept.exists():
        fastest_of_equal_cost(measurement, plain, limit).save(kept)
    fast = Plan.load(kept)
    fast_path, fast_score = files.scored(fast, f"{arguments.bpw}-speed")
    plain, plain_path, plain_score = files.of_kld(arguments.bpw, fast_score.overall().kld.value)
    plans = {"bytes": plain, "speed": fast}
    paths = {"bytes": plain_path, "speed": fast_path}
    scores = {"bytes": plain_score, "speed": fast_score}
    request = CheckRequest(
        ContextShape(N_CTX), available_memory(), n_threads=arguments.threads, n_prompt=64,
        n_generated=16, n_said=4,
    )  # fmt: skip
    generation: dict[str, list[float]] = {name: [] for name in paths}
    prompt: dict[str, list[float]] = {name: [] for name in paths}
    for k in range(arguments.rounds):
        for name in list(paths)[:: 1 if k % 2 else -1]:
            speed = check_file(paths[name], request).speed
            assert speed is not None
            assert speed.generation is not None
            generation[name].append(speed.generation.median)
            prompt[name].append(speed.prompt.median)
    ratios = [b / a for a, b in zip(generation["bytes"], generation["speed"], strict=True)]
    row: dict[str, object] = {
        "bench": "min_speed",
        "model": source.stem,
        "bpw": arguments.bpw,
        "imatrix": arguments.imatrix is not None,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "windows": arguments.windows,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    for name, plan in plans.items():
        kld = scores[name].overall().kld
        low, high = (round(end or 0.0, 5) for end in (kld.low, kld.high))
        expected = limit.planned(plan.assignments)
        row[name] = {
            "n_bytes": plan.n_bytes,
            "cost": plan.total_cost,
            "gap": plan.gap,
            "kld": [round(kld.value, 5), low, high],
            "predicted_generation": round(expected.generation, 2),
            "generation": round(statistics.median(generation[name]), 2),
            "prompt": round(statistics.median(prompt[name]), 1),
            "formats": _counts(plan),
        }
    row |= {"engine": system_info().build, **provenance()}
    print(json.dumps(row, indent=1))
    with arguments.out.open("a") as out:
        out.write(json.dumps(row) + "\n")


def _counts(plan: Plan) -> dict[str, int]:
    """Return the bytes of each format."""
    counts: dict[str, int] = {}
    for a in plan.assignments:
        counts[a.format] = counts.get(a.format, 0) + a.n_bytes
    return dict(sorted(counts.items()))


if __name__ == "__main__":
    main()
