"""How long a plan takes to solve, and how near the optimum it is proven to be.

    python bench/allocation_speed.py --measurement smol768-f16.rd.json

A thousand tensors × 14 formats of four shapes, with sensitivities of their own or all alike, five
of each, and a real model's measurement, with HiGHS (scipy) on the whole problem beside it for 5 s.
Seconds are the thread's CPU time. Rows are added to bench/results/allocation_speed.jsonl.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from provenance import provenance
from ramgguf.measure.result import Measurement
from ramgguf.plan.knapsack import Choice, smallest, solve
from ramgguf.plan.objectives import OBJECTIVES, costing
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import Constraints

Items = Sequence[Sequence[Choice]]

N_TENSORS, N_FORMATS, N_SEEDS, N_RUNS = 1000, 14, 5, 3
BPW = (1.75, 2.0625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.0, 5.5, 6.0, 6.5625, 8.5, 12.0, 16.0)
SHAPES = (768 * 192, 768 * 768, 768 * 1536, 4096 * 4096)


def made_up(seed: int, *, symmetric: bool) -> Items:
    """Return tensors that lose 6 dB a bit, give or take; symmetric ones are alike within 0.5 %."""
    rng = np.random.default_rng(seed)
    items = []
    for n in rng.choice(SHAPES, N_TENSORS).tolist():
        alpha = n if symmetric else n * rng.lognormal(0, 1.5)
        noise = 1 + (0.005 if symmetric else 0.2) * rng.uniform(-1, 1, N_FORMATS)
        cost = alpha * np.array([4.0**-b if b < 16 else 0.0 for b in BPW]) * noise
        items.append([Choice(int(n * b / 8), float(c)) for b, c in zip(BPW, cost, strict=True)])
    return items


def highs(items: Items, capacity: int, seconds: float = 5.0) -> tuple[float, float, float]:
    """Return cost, gap and CPU seconds of HiGHS; raises SystemExit when it finds nothing."""
    item = np.repeat(np.arange(len(items)), [len(i) for i in items])
    n_bytes = np.array([c.n_bytes for i in items for c in i], np.float64)
    cost = np.array([c.cost for i in items for c in i])
    one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))))
    start = time.thread_time()
    found = milp(
        cost / cost.max(),
        constraints=LinearConstraint(
            vstack([one_each, csr_array(n_bytes[None, :] / capacity)]),
            np.append(np.ones(len(items)), -np.inf),
            np.ones(len(items) + 1),
        ),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": seconds},
    )
    took = time.thread_time() - start
    if found.x is None:
        raise SystemExit(f"HiGHS found nothing in {seconds:g} s")
    return float(found.fun * cost.max()), float(found.mip_gap), took


def measured(name: str, items: Items, capacity: int, *, rival: bool) -> dict[str, object]:
    """Return a row of results: the median CPU time of some runs, and the gap."""
    seconds = []
    for _ in range(N_RUNS):
        start = time.thread_time()
        solution = solve(items, capacity)
        seconds.append(time.thread_time() - start)
    row: dict[str, object] = {
        "bench": "allocation_speed",
        "problem": name,
        "n_tensors": len(items),
        "n_choices": sum(len(i) for i in items),
        "capacity": capacity,
        "cost": solution.cost,
        "gap": solution.gap,
        "unused": 1 - solution.n_bytes / capacity,
        "cpu_seconds": round(statistics.median(seconds), 4),
        "cpu_seconds_range": [round(min(seconds), 4), round(max(seconds), 4)],
    }
    if rival:
        cost, gap, took = highs(items, capacity)
        row |= {
            "highs_excess": cost / solution.cost - 1,
            "highs_gap": gap,
            "highs_cpu_seconds": round(took, 3),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurement", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/allocation_speed.jsonl"))
    arguments = parser.parse_args()
    rows = []
    for symmetric in (False, True):
        for seed in range(N_SEEDS):
            items = made_up(seed, symmetric=symmetric)
            most = sum(item[-1].n_bytes for item in items)
            for share in (0.18, 0.28, 0.5):
                name = f"{'symmetric' if symmetric else 'varied'} {share}, seed {seed}"
                capacity = max(int(share * most), smallest(items))
                rows.append(measured(name, items, capacity, rival=False))
    if arguments.measurement:
        model = Measurement.load(arguments.measurement)
        for objective in OBJECTIVES:
            cost = costing(objective, model).cost
            items = Problem.of(model, Constraints(min_sqnr_db=0), cost).items
            for budget in (86_000_000, 104_000_000, 122_300_000):
                name = f"{model.source.name} {objective} {budget / 1e6:g} MB"
                rows.append(measured(name, items, budget - model.n_overhead_bytes, rival=True))
    with arguments.out.open("a") as out:
        for row in rows:
            out.write(json.dumps(row | provenance()) + "\n")
            json.dump(row, sys.stdout)
            print()


if __name__ == "__main__":
    main()
