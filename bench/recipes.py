"""What each part of a recipe brings, at equal bytes: feedback, tokens, descent, scales.

    python bench/recipes.py models/smol135d-f16.gguf --mixes Q3_K_M,Q4_K_M --n-ctx 512 --rounds 3

All files plan by priors, with the matrix of their tokens of the mix, at the bytes of llama.cpp's
mixes (without a matrix, or with it where llama.cpp asks for one). Matrices and Hessians are made in
the folder once. Files of a size are scored side by side on the package's `score` texts, which
nothing else has read. Rows are added to bench/results/recipes.jsonl; `--table` prints them: KLD
over that of `gptq` with 12 × 512 tokens, 95 % intervals by bootstrap over windows, paired.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ramgguf
from llama_quantize import quantize as llama_quantize
from provenance import provenance
from ramgguf.evaluate import score_held_out
from ramgguf.evaluate.held_out import resamples
from ramgguf.quants.encoders import EncoderName

BASE = "gptq 12"
FEW, MANY = 12, 48  # sequences of 512 tokens


@dataclass(frozen=True)
class Recipe:
    """An encoder, the sequences that it has met, and whether the model has scales."""

    name: str
    encoder: EncoderName
    n_sequences: int
    is_scaled: bool = False


RECIPES = (
    Recipe("search 12", "search", FEW),
    Recipe(BASE, "gptq", FEW),
    Recipe("gptq 48", "gptq", MANY),
    Recipe("descent 48", "descent", MANY),
    Recipe("search 48, scales", "search", MANY, is_scaled=True),
    Recipe("gptq 48, scales", "gptq", MANY, is_scaled=True),
    Recipe("descent 48, scales", "descent", MANY, is_scaled=True),
)


def inputs(source: Path, folder: Path, n: int) -> tuple[Path, Path, Path]:
    """Return matrix, Hessians and scales by n sequences, made now or before."""
    stem = folder / f"{source.stem}-{n}"
    imatrix, hessian, scales = (
        stem.with_name(f"{stem.name}.{kind}.gguf") for kind in ("imatrix", "hessian", "scales")
    )
    if not hessian.exists():
        ramgguf.calibrate(source, imatrix, tokens="mix", n_sequences=n, hessian=hessian, force=True)
    if not scales.exists():
        ramgguf.transform(source, scales, imatrix, check=False)
    return imatrix, hessian, scales


def made(source: Path, folder: Path, mix: str) -> Iterator[tuple[Recipe, Path]]:
    """Yield the recipes' files at the mix's bytes."""
    weighed = {n: inputs(source, folder, n) for n in (FEW, MANY)}
    reference = folder / f"{source.stem}-{mix}.gguf"
    llama_quantize(source, reference, mix)
    budget = reference.stat().st_size
    reference.unlink()
    for recipe in RECIPES:
        imatrix, hessian, scales = weighed[recipe.n_sequences]
        path = folder / f"{source.stem}-{mix}-{recipe.name.replace(', ', '-')}.gguf"
        ramgguf.quantize(
            source, budget, path, effort="fast", encoder=recipe.encoder, imatrix=imatrix,
            hessian=None if recipe.encoder == "search" else hessian,
            scales=scales if recipe.is_scaled else None, verify=False, force=True,
        )  # fmt: skip
        yield recipe, path


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table per model, mix and context."""
    for key in dict.fromkeys((r["model"], r["mix"], r["n_ctx"]) for r in rows):
        group = [r for r in rows if (r["model"], r["mix"], r["n_ctx"]) == key]
        base = next(r for r in group if r["recipe"] == BASE)
        domains = list(base["domains"])
        yield f"\n{key[0]} at {base['n_bytes']:,} bytes ({key[1]}), windows of {key[2]}:\n"
        yield f"| | {' | '.join(dict.fromkeys(domains))} | all | KLD |"
        yield "|---" * (len(set(domains)) + 3) + "|"
        theirs = np.array(base["kld"])
        for row in group:
            mine, cells = np.array(row["kld"]), []
            for domain in dict.fromkeys(domains):
                at = [i for i, d in enumerate(domains) if d == domain]
                cells.append(f"{mine[at].mean() / theirs[at].mean():.2f}")
            counts = resamples(domains)
            low, high = np.quantile(counts @ mine / (counts @ theirs), (0.025, 0.975))
            cells.append(f"{mine.mean() / theirs.mean():.2f} ({low:.2f}–{high:.2f})")
            yield f"| {row['recipe']} | {' | '.join(cells)} | {mine.mean():.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--mixes", default="Q2_K,Q3_K_M,Q4_K_M,Q5_K_M")
    parser.add_argument("--n-ctx", type=int, nargs="+", default=[512])
    parser.add_argument("--rounds", type=int, default=3, help="windows per domain")
    parser.add_argument("--folder", type=Path, default=Path("models/recipes"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/recipes.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        for mix in options.mixes.split(","):
            files = list(made(options.source, options.folder, mix))
            for n_ctx in options.n_ctx:
                scores = score_held_out(
                    [path for _, path in files], options.source, n_ctx=n_ctx,
                    max_rounds=options.rounds, seconds=None,
                )  # fmt: skip
                with options.out.open("a") as out:
                    for (recipe, path), score in zip(files, scores, strict=True):
                        row = {
                            "model": options.source.stem,
                            "mix": mix,
                            "n_ctx": n_ctx,
                            "recipe": recipe.name,
                            "n_bytes": path.stat().st_size,
                            "domains": [w.domain for w in score.windows],
                            "kld": [round(w.kld_sum / w.n_tokens, 6) for w in score.windows],
                            **provenance(),
                        }
                        out.write(json.dumps(row) + "\n")
            for _, path in files:
                path.unlink()
    print("\n".join(table([json.loads(line) for line in options.out.read_text().splitlines()])))


if __name__ == "__main__":
    main()
