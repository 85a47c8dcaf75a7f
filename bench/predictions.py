"""What plans are predicted to lose, against what their files lose on text that nothing else saw.

    python bench/predictions.py models/qwen05-f16.gguf qwen05.sens.json --folder scratch

Plans of many sizes, by α and by other objectives, of all formats and of some, are written and
scored on the mix's part for scores (docs/evaluation.md). Σ α · NMSE (of the tokens that scores
count), what it is uncertain by, and the KLD go to bench/results/predictions.jsonl, plan by plan;
what is there is not done again.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.evaluate.held_out import score_held_out
from ramgguf.measure.result import Measurement
from ramgguf.plan.objectives import costing
from ramgguf.plan.prediction import Calibration, interval
from ramgguf.plan.result import Plan
from ramgguf.sensitivity.result import Sensitivity

OUT = Path(__file__).parent / "results" / "predictions.jsonl"
ROUNDS, N_THREADS = 2, 2
LEAST_BPW, MOST_BPW = 3.3, 7.0


def done(model: str, plan: str) -> bool:
    text = OUT.read_text() if OUT.exists() else ""
    found = [json.loads(line) for line in text.splitlines()]
    return any((row["model"], row["plan"]) == (model, plan) for row in found)


def plans(measurement: Measurement, sensitivity: Sensitivity) -> Iterator[tuple[str, Plan]]:
    """Yield plans from 3.3 bpw or nearly the smallest to 7 bpw, by several objectives."""
    frontier = ramgguf.curve(measurement, objective="sensitivity", sensitivity=sensitivity)
    least = max(LEAST_BPW, 8.3 * frontier.start_bytes / frontier.n_weights)
    sizes = np.geomspace(least, MOST_BPW, 11)

    def at(i: int) -> str:
        return f"{sizes[i]:.2f}bpw"

    for i in (0, 2, 4, 6, 8, 10):
        yield (
            f"sensitivity {at(i)}",
            ramgguf.plan(measurement, at(i), objective="sensitivity", sensitivity=sensitivity),
        )
    for objective, i in (("weighted", 1), ("weighted", 5), ("weighted", 9), ("nmse", 3)):
        plan = ramgguf.plan(measurement, at(i), objective=objective)
        yield f"{objective} {at(i)}", plan
    for formats, i in (("cpu-fast", 5), ("linear", 7), ("linear", 6)):
        plan = ramgguf.plan(
            measurement, at(i), objective="sensitivity", sensitivity=sensitivity, formats=[formats]
        )
        yield f"sensitivity, {formats} {at(i)}", plan


def fitted(rows: Sequence[Mapping[str, Any]]) -> Calibration:
    """Return the calibration that one family's plans, or several families', give.

    The kernels' share is what spreads log KLD least about its prediction over the sizes, whatever
    the level: a model's α is read once, so a bias that all its plans share is no property of other
    models. The spread is that of each domain's KLD about the prediction, as α is read on one text
    and the KLD is that of others.
    """
    alpha_nmse = np.array([row["alpha_nmse"] for row in rows])
    alpha = np.array([row["alpha_quantized"] for row in rows])
    domains = np.log([list(row["kld_by_domain"].values()) for row in rows])
    models = np.array([row["model"] for row in rows])
    kld = np.log([row["kld"] for row in rows])

    def spread(kernel: float) -> float:
        ratio = kld - np.log(alpha_nmse + kernel * alpha)
        return float(sum((ratio[models == m].std() ** 2) for m in set(models)))

    kernel = min((0.0, *np.geomspace(1e-6, 1e-3, 61).tolist()), key=spread)
    ratios = domains - np.log(alpha_nmse + kernel * alpha)[:, None]
    return Calibration(kernel_nmse=kernel, spread=float(np.sqrt((ratios**2).mean())))


def covered(rows: Sequence[Mapping[str, Any]], calibration: Calibration) -> list[bool]:
    """Return whether each plan's measured KLD lies in the interval that was predicted."""
    found = [
        interval(row["alpha_nmse"], row["alpha_quantized"], row["alpha_error"], calibration)
        for row in rows
    ]
    return [
        p is not None and p.low <= row["kld"] <= p.high for p, row in zip(found, rows, strict=True)
    ]


def run(source: Path, sensitivity: Sensitivity, folder: Path) -> None:
    model = source.stem.removesuffix("-f16")
    measurement = ramgguf.measure(source, encoder=sensitivity.encoder, threads=N_THREADS)
    priced = costing("sensitivity", measurement, sensitivity)
    late = sensitivity.late_shares()
    alpha = {t.name: t.alpha * late[t.name] for t in sensitivity.tensors}
    for name, plan in plans(measurement, sensitivity):
        if done(model, name):
            continue
        path = folder / f"{model}.plan.gguf"
        ramgguf.quantize(source, from_plan=plan, output=path, force=True, verify=False)
        (score,) = score_held_out(
            [path],
            source,
            max_rounds=ROUNDS,
            seconds=None,
            reference_logits=folder / f"{model}.logits",
            threads=N_THREADS,
        )
        path.unlink()
        kld = score.overall().kld
        terms = [(alpha.get(a.name, 0.0), a) for a in plan.assignments]
        row = {
            "bench": "predictions",
            "model": model,
            "architecture": measurement.source.architecture,
            "plan": name,
            "bpw": round(plan.bpw, 3),
            "n_bytes": plan.n_bytes,
            "tokens": f"{sensitivity.tokens.n_tokens} {sensitivity.tokens.kind}",
            "alpha_nmse": math.fsum(x * a.nmse for x, a in terms),
            "alpha_error": math.fsum(priced.errors.get(a.name, 0.0) * x * a.nmse for x, a in terms),
            "alpha_quantized": math.fsum(x for x, a in terms if a.nmse > 0),
            "n_windows": len(score.windows),
            "kld": kld.value,
            "kld_low": kld.low,
            "kld_high": kld.high,
            "kld_by_domain": {d: round(score.of(d).kld.value, 5) for d in score.domains},
            **provenance(),
        }
        print(json.dumps(row), flush=True)
        with OUT.open("a") as out:
            out.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("sensitivity", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    run(arguments.model, Sensitivity.load(arguments.sensitivity), arguments.folder)


if __name__ == "__main__":
    main()
