"""In which proportions the mix's domains make the best importance matrix, at equal bytes.

    python bench/mix_proportions.py models/smol135d-f16.gguf --budget 105.5MB --folder scratch

Each domain of the mix's `calibrate` part is read alone, by as many sequences. A matrix is a sum of
these with weights: all alike, one domain twice, one left out, one alone. Files have the same
formats (effort fast plans by unweighted errors), so that only the matrix differs, and are scored
on the mix's `gate` part. Rows go to bench/results/mix_proportions.jsonl: KLD by domain, and the
geometric mean over domains of its ratio to that of equal weights, with a 95 % interval by paired
bootstrap over windows. What is there is not done again; `--table` prints it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ramgguf
from provenance import provenance
from ramgguf.calibrate.activations import Outputs, calibrate_file
from ramgguf.core.progress import Silent
from ramgguf.evaluate import HeldOutScore, score_held_out
from ramgguf.evaluate.held_out import resamples
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.domains import domain_corpora
from ramgguf.llama.tokens import N_CTX, TokenRequest, TokenSource
from ramgguf.quants.imatrix import InputSquares, load_imatrix, write_imatrix

OUT = Path(__file__).parent / "results" / "mix_proportions.jsonl"
GATE_CTX = 256
ALIKE = "all alike"

Weights = Mapping[str, int]


def proportions(domains: Sequence[str]) -> Iterator[tuple[str, Weights]]:
    """Yield the weights that are tried, equal ones first."""
    one = dict.fromkeys(domains, 1)
    yield ALIKE, one
    for domain in domains:
        yield f"{domain} twice", one | {domain: 2}
        yield f"no {domain}", one | {domain: 0}
        yield f"{domain} alone", dict.fromkeys(domains, 0) | {domain: 1}


def read(source: Path, folder: Path, n_sequences: int, threads: int) -> dict[str, Path]:
    """Return each domain's own matrix, from as many sequences."""
    found = {}
    with open_gguf(source) as file:
        for domain, corpus in domain_corpora(file, "calibrate").items():
            path = folder / f"{source.stem}.{domain}.{n_sequences}.imatrix.gguf"
            found[domain] = path
            if path.exists():
                continue
            calibrate_file(
                file,
                TokenRequest("rtn", n_sequences=n_sequences, n_ctx=N_CTX),
                (TokenSource(domain, 1.0, "text", corpus),),
                Outputs(path),
                threads=threads,
                progress=Silent(),
            )
    return found


def weighted(parts: Mapping[str, Path], weights: Weights, n_tokens: int, to: Path) -> None:
    """Write the matrix of all parts' tokens, a part's tokens counted weight times."""
    chosen = {domain: load_imatrix(parts[domain]) for domain, w in weights.items() if w}
    entries: dict[str, InputSquares] = {}
    for name in next(iter(chosen.values())).entries:
        sums = sum(
            weights[d] * n_tokens * m.entries[name].values.astype(np.float64)
            for d, m in chosen.items()
        )
        total = sum(weights[d] * n_tokens for d in chosen)
        entries[name] = InputSquares(np.asarray(sums), np.array([total], np.int64))
    write_imatrix(
        to, entries, dataset=", ".join(f"{d}:{w}" for d, w in weights.items()),
        n_chunks=n_tokens // N_CTX, chunk_size=N_CTX,
        model_sample=next(iter(chosen.values())).model_sample, force=True,
    )  # fmt: skip


def ratio(mine: HeldOutScore, base: HeldOutScore) -> tuple[float, float, float]:
    """Return the geometric mean over domains of the KLD's ratio, and its 95 % interval."""
    domains = [w.domain for w in base.windows]
    counts = np.concatenate([np.ones((1, len(domains))), resamples(domains)])
    logs = []
    for domain in base.domains:
        here = np.array([d == domain for d in domains])
        a, b = (np.array([w.kld_sum for w in s.windows])[here] for s in (mine, base))
        logs.append(np.log(counts[:, here] @ a) - np.log(counts[:, here] @ b))
    found = np.exp(np.mean(logs, axis=0))
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


def run(source: Path, options: argparse.Namespace, done: set[str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each proportion that is not there yet."""
    folder: Path = options.folder
    parts = read(source, folder, options.sequences, options.threads)
    base: HeldOutScore | None = None
    kept = folder / f"{source.stem}.gate.logits"
    for name, weights in proportions(tuple(parts)):
        if name in done and name != ALIKE:
            continue
        matrix, path = folder / "weighted.imatrix.gguf", folder / "weighted.gguf"
        weighted(parts, weights, options.sequences * N_CTX, matrix)
        made = ramgguf.quantize(
            source, options.budget, path, effort="fast", imatrix=matrix, verify=False, force=True,
            threads=options.threads,
        )  # fmt: skip
        (score,) = score_held_out(
            [path], source, part="gate", n_ctx=GATE_CTX, max_rounds=options.rounds, seconds=None,
            reference_logits=kept, threads=options.threads,
        )  # fmt: skip
        base = base or score
        value, low, high = ratio(score, base)
        path.unlink()
        if name in done:
            continue
        yield {
            "bench": "mix_proportions", "model": source.stem, "budget": options.budget,
            "weights": name, "n_bytes": made.n_bytes, "n_sequences": options.sequences,
            "n_windows": len(score.windows), "kld": score.overall().kld.value,
            "kld_by_domain": {d: round(score.of(d).kld.value, 5) for d in score.domains},
            "ratio": round(value, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4),
            **provenance(),
        }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table per model and budget: ratios to equal weights."""
    for key in dict.fromkeys((r["model"], r["budget"]) for r in rows):
        group = [r for r in rows if (r["model"], r["budget"]) == key]
        base = next(r for r in group if r["weights"] == ALIKE)["kld_by_domain"]
        yield f"\n{key[0]}, {key[1]}:\n"
        yield f"| weights | {' | '.join(base)} | mean |"
        yield "|---" * (len(base) + 2) + "|"
        for row in group:
            cells = [f"{row['kld_by_domain'][d] / base[d]:.2f}" for d in base]
            mean = f"{row['ratio']:.3f} ({row['ratio_low']:.3f}–{row['ratio_high']:.3f})"
            yield f"| {row['weights']} | {' | '.join(cells)} | {mean} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--budget", default="4.5bpw")
    parser.add_argument("--sequences", type=int, default=8, help="of each domain")
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--folder", type=Path, default=Path("scratch"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    rows = []
    if options.out.exists():
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        here = (options.source.stem, options.budget)
        done = {r["weights"] for r in rows if (r["model"], r["budget"]) == here}
        for row in run(options.source, options, done):
            print(json.dumps(row), flush=True)
            rows.append(row)
            with options.out.open("a") as out:
                out.write(json.dumps(row) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
