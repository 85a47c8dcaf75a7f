"""Is a plan that knows the speed of formats faster than one of bytes alone, of equal KLD?

    python bench/min_speed.py models/qwen05-f16.gguf --bpw 5.5 --folder models/min-speed

One file is planned by bytes. The other is the fastest plan whose predicted cost is no higher, its
bytes free: --min-speed is bisected for it (plans and files that are in the folder are taken as they
are). Both are scored against the source on the same held-out
text, and timed by `check` in turn, so that other load affects both. A row for both goes to
bench/results/min_speed.jsonl; speeds are medians over all repeats, their ratio is of each round.
"""

import argparse
import json
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
    plain = ramgguf.plan(measurement, f"{arguments.bpw}bpw")
    kept = folder / f"{source.stem}-{arguments.bpw}-speed.json"
    if not kept.exists():
        fastest_of_equal_cost(measurement, plain, limit).save(kept)
    plans = {"bytes": plain, "speed": Plan.load(kept)}
    paths = {}
    for name, plan in plans.items():
        paths[name] = folder / f"{source.stem}-{arguments.bpw}-{name}.gguf"
        if not paths[name].exists() or paths[name].stat().st_size != plan.n_bytes:
            ramgguf.quantize(
                source, None, paths[name], from_plan=plan, imatrix=arguments.imatrix, force=True
            )
    found = score_held_out(list(paths.values()), source, seconds=None, max_rounds=arguments.windows)
    scores: dict[str, HeldOutScore] = dict(zip(paths, found, strict=True))
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
