"""Does quantization regularize? A quantized model against noise as large as its errors.

    python bench/noise.py models/smol768-f16.gguf --budget 104MB --seeds 10 --text T.txt

Scores the model, its quantization, and models with Gaussian noise of each row's own quantization
error, by corpus PPL, median PPL, outliers and KLD. Appends a line per file to
bench/results/noise.jsonl.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.results import EvalResult
from scores import scores


def main() -> None:
    arguments = parse()
    plan = ramgguf.plan(
        ramgguf.measure(arguments.source, threads=arguments.threads), arguments.budget
    )
    found: list[tuple[str, EvalResult]] = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        small = Path(folder) / "quantized.gguf"
        ramgguf.quantize(arguments.source, from_plan=plan, output=small, verify=False)
        found.append(("source", score(arguments, arguments.source)))
        found.append(("quantized", score(arguments, small)))
        for seed in range(arguments.seeds):
            noisy = Path(folder) / "noisy.gguf"
            ramgguf.perturb(arguments.source, plan, noisy, seed=seed, force=True)
            found.append((f"noise {seed}", score(arguments, noisy)))
    report(arguments, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--budget", default="104MB")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/noise.jsonl"))
    return parser.parse_args()


def score(arguments: argparse.Namespace, path: Path) -> EvalResult:
    """Return the scores of one file against the source."""
    return ramgguf.evaluate(
        [path], arguments.source, text=arguments.text, n_ctx=512, n_seq=arguments.n_seq,
        threads=arguments.threads,
    ).results[0]  # fmt: skip


def report(arguments: argparse.Namespace, found: list[tuple[str, EvalResult]]) -> None:
    """Print each statistic of the quantized model beside the noise's mean and spread."""
    all_scores = {name: scores(result) for name, result in found}
    with arguments.out.open("a") as out:
        for name, result in found:
            row = {
                "file": name,
                "budget": arguments.budget,
                **asdict(all_scores[name]),
                "outliers": sum(s.nll_sum / s.n_scored > np.log(100) for s in result.sequences),
                "n_seq": arguments.n_seq,
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
