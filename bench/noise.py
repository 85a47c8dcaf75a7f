"""Does quantization regularize? A quantized model against noise as large as its errors.

    python bench/noise.py models/smol768-f16.gguf --budget 104MB --seeds 10

Scores the model, its quantization, and models with Gaussian noise of each row's own quantization
error, by corpus PPL, median PPL, outliers and KLD. Appends a line per file to
bench/results/noise.jsonl.
"""

import argparse
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.evaluate.result import EvalResult
from scores import scores

AT_ONCE = 5  # noisy files on the disk, decoded beside one reference


def main() -> None:
    arguments = parse()
    plan = ramgguf.plan(
        ramgguf.measure(arguments.source, threads=arguments.threads), arguments.budget
    )
    found: list[tuple[str, EvalResult]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        small = Path(folder) / "quantized.gguf"
        ramgguf.quantize(arguments.source, from_plan=plan, output=small, verify=False)
        found += score(arguments, {"source": arguments.source, "quantized": small})
        for first in range(0, arguments.seeds, AT_ONCE):
            seeds = range(first, min(first + AT_ONCE, arguments.seeds))
            noisy = {f"noise {seed}": Path(folder) / f"noise-{seed}.gguf" for seed in seeds}
            for seed, path in zip(seeds, noisy.values(), strict=True):
                ramgguf.perturb(arguments.source, plan, path, seed=seed)
            found += score(arguments, noisy)
            for path in noisy.values():
                path.unlink()
    report(arguments, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--budget", default="104MB")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/noise.jsonl"))
    return parser.parse_args()


def score(arguments: argparse.Namespace, files: dict[str, Path]) -> list[tuple[str, EvalResult]]:
    """Return the scores of files against the source, side by side."""
    results = ramgguf.evaluate(
        list(files.values()),
        arguments.source,
        n_ctx=512,
        n_seq=arguments.n_seq,
        threads=arguments.threads,
    ).results
    return list(zip(files, results, strict=True))


def report(arguments: argparse.Namespace, found: list[tuple[str, EvalResult]]) -> None:
    """Print each statistic of the quantized model beside the noise's mean and spread."""
    all_scores = {name: scores(result) for name, result in found}
    with arguments.out.open("a") as out:
        for name, result in found:
            row = {
                "model": arguments.source.stem,
                "file": name,
                "budget": arguments.budget,
                **asdict(all_scores[name]),
                "outliers": sum(s.nll_sum / s.n_scored > math.log(100) for s in result.sequences),
                "n_seq": len(result.sequences),
                **provenance(),
            }
            out.write(json.dumps(row) + "\n")
    for what in ("kld", "corpus_ppl", "median_ppl"):
        noise = np.array([getattr(s, what) for n, s in all_scores.items() if "noise" in n])
        print(
            f"{what}: source {getattr(all_scores['source'], what):.4f}, quantized "
            f"{getattr(all_scores['quantized'], what):.4f}, noise {noise.mean():.4f} ± "
            f"{noise.std(ddof=1):.4f} over {len(noise)} seeds"
        )


if __name__ == "__main__":
    main()
