"""What each part of a recipe brings, at equal bytes: feedback, tokens, descent, scales.

    python bench/recipes.py models/smol135d-f16.gguf --mixes Q3_K_M,Q4_K_M --n-ctx 512 --rounds 3
    python bench/recipes.py models/smol135d-f16.gguf --mixes Q4_K_M --gptq mix:12 mix:48 self:48
    python bench/recipes.py models/smol768-f16.gguf --mixes IQ2_M,IQ3_XXS --llama
    python bench/recipes.py models/qwen05d-f16.gguf --mixes Q4_K_M --recipes "gptq 12" "gptq 48"

All files plan by priors, with the matrix of their tokens, of the mix where nothing else is said, at
the bytes of llama.cpp's mixes (without a matrix, or with it where llama.cpp asks for one).
`--gptq` compares sources and numbers of tokens (sequences of 512) instead, without scales;
`--llama` adds llama.cpp's mix, without a matrix and with that of the most tokens. Matrices and
Hessians are made in the folder once. Files of a size are scored side by side on the package's
`score` texts, which nothing else has read. Rows are added to bench/results/recipes.jsonl; `--table`
prints them: KLD over that of `gptq` with 12 × 512 tokens (of the first of `--gptq`), 95 % intervals
by bootstrap over windows, paired.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ramgguf
from llama_quantize import NEED_MATRIX
from llama_quantize import quantize as llama_quantize
from paired import domain_ratios, kld_ratio
from provenance import provenance
from ramgguf.evaluate import score_held_out
from ramgguf.plan.result import QuantizedInputs
from ramgguf.quantize import Quantized
from ramgguf.quantize.quantized_inputs import Rounding, rounded_layers
from ramgguf.quantize.schedule import LAYER_SEQUENCES
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.formats import HALVES, offered

BASE = "gptq 12"
WITHOUT_POINTS = [
    name for name in (*offered(), *HALVES) if not name.startswith(("IQ1", "IQ2", "IQ3"))
]
FEW, MANY = 12, 48  # sequences of 512 tokens


@dataclass(frozen=True)
class Recipe:
    """An encoder, the sequences of its matrix and Hessians, and whether the model has scales.

    Without an encoder it is llama.cpp's mix, with a matrix where there are sequences. For
    quantized inputs of so many sequences, weights are rounded anew, layer by layer; 0: they are
    not. Plans may have formats whose codes stand for points (IQ2_XS, IQ3_S) where has_points.
    """

    name: str
    encoder: EncoderName | None
    n_sequences: int
    is_scaled: bool = False
    tokens: str = "mix"
    n_quantized_inputs: int = 0
    has_points: bool = True


RECIPES = (
    Recipe("search 12", "search", FEW),
    Recipe("gptq 12, no points", "gptq", FEW, has_points=False),
    Recipe(BASE, "gptq", FEW),
    Recipe("gptq 48", "gptq", MANY),
    Recipe("descent 48", "descent", MANY),
    Recipe("gptq 12, quantized inputs", "gptq", FEW, n_quantized_inputs=FEW),
    Recipe("descent 48, quantized inputs", "descent", MANY, n_quantized_inputs=LAYER_SEQUENCES),
    Recipe("search 48, scales", "search", MANY, is_scaled=True),
    Recipe("gptq 48, scales", "gptq", MANY, is_scaled=True),
    Recipe("descent 48, scales", "descent", MANY, is_scaled=True),
    Recipe(
        "descent 48, scales, quantized inputs",
        "descent",
        MANY,
        is_scaled=True,
        n_quantized_inputs=LAYER_SEQUENCES,
    ),
    Recipe(
        f"descent 48, scales, quantized inputs {MANY}",
        "descent",
        MANY,
        is_scaled=True,
        n_quantized_inputs=MANY,
    ),
)


def llama_recipes(mix: str, n: int) -> Iterator[Recipe]:
    """Yield llama.cpp's mixes: with a matrix, and without where it does not ask for one."""
    if mix not in NEED_MATRIX:
        yield Recipe("llama.cpp", None, 0)
    yield Recipe(f"llama.cpp {n}", None, n)


def token_recipes(wanted: Sequence[str]) -> Iterator[Recipe]:
    """Yield error feedback by tokens, each named as SOURCE:SEQUENCES."""
    for one in wanted:
        tokens, n = one.rsplit(":", 1)
        name = f"gptq {n}" if tokens == "mix" else f"gptq {n}, {tokens}"
        yield Recipe(name, "gptq", int(n), tokens=tokens)


def inputs(source: Path, folder: Path, recipe: Recipe, n_ctx: int) -> tuple[Path, Path, Path]:
    """Return matrix, Hessians and scales by the recipe's tokens, made now or before."""
    of = recipe.n_sequences if recipe.tokens == "mix" else f"{recipe.tokens}-{recipe.n_sequences}"
    stem = folder / f"{source.stem}-{of}"
    imatrix, hessian, scales = (
        stem.with_name(f"{stem.name}.{kind}.gguf") for kind in ("imatrix", "hessian", "scales")
    )
    if not hessian.exists():
        ramgguf.calibrate(
            source, imatrix, tokens=recipe.tokens, n_sequences=recipe.n_sequences, n_ctx=n_ctx,
            hessian=hessian, force=True,
        )  # fmt: skip
    if recipe.is_scaled and not scales.exists():
        ramgguf.transform(source, scales, imatrix, check=False)
    return imatrix, hessian, scales


def made(
    source: Path, folder: Path, mix: str, recipes: Sequence[Recipe], n_ctx: int
) -> Iterator[tuple[Recipe, Path]]:
    """Yield the recipes' files at the mix's bytes; n_ctx is that of calibration."""
    budget = 0
    for recipe in (_reference(mix, recipes), *recipes):
        path = folder / f"{source.stem}-{mix}-{recipe.name.replace(', ', '-')}.gguf"
        if recipe.n_sequences:
            imatrix, hessian, scales = inputs(source, folder, recipe, n_ctx)
        if recipe.encoder is None:
            path.unlink(missing_ok=True)
            llama_quantize(source, path, mix, imatrix=imatrix if recipe.n_sequences else None)
            if not budget:
                budget = path.stat().st_size
                path.unlink()
                continue
        else:
            plain = ramgguf.quantize(
                source, budget, path, effort="fast", encoder=recipe.encoder, imatrix=imatrix,
                hessian=None if recipe.encoder == "search" else hessian,
                scales=scales if recipe.is_scaled else None, verify=False, force=True,
                formats=None if recipe.has_points else WITHOUT_POINTS,
            )  # fmt: skip
            if recipe.n_quantized_inputs:
                began = time.perf_counter()
                round_anew(source, plain, recipe, n_ctx)
                print(f"{recipe.name}: {time.perf_counter() - began:.0f} s", flush=True)
        yield recipe, path


def round_anew(source: Path, plain: Quantized, recipe: Recipe, n_ctx: int) -> None:
    """Round the file anew for its quantized inputs."""
    inputs = QuantizedInputs(
        tokens=recipe.tokens, n_sequences=recipe.n_quantized_inputs, n_ctx=n_ctx
    )
    (path,) = plain.paths
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        rounding = Rounding(inputs, Path(folder) / "layers.gguf", Path(folder))
        with rounded_layers(source, plain, rounding) as made:
            made.paths[0].replace(path)


def _reference(mix: str, recipes: Sequence[Recipe]) -> Recipe:
    """Return llama.cpp's mix whose bytes all others get."""
    n = max((r.n_sequences for r in recipes if r.tokens == "mix"), default=FEW)
    return next(llama_recipes(mix, n))


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a Markdown table per model, mix and context."""

    def group_of(r: dict[str, Any]) -> tuple[str, str, int, int]:
        return r["model"], r["mix"], r["n_ctx"], len(r["domains"])

    for key in dict.fromkeys(map(group_of, rows)):
        group = list(
            {r["recipe"]: r for r in rows if group_of(r) == key}.values()
        )  # the latest of each
        ours = [r for r in group if not r["recipe"].startswith("llama.cpp")]
        base = next((r for r in ours if r["recipe"] == BASE), ours[0])
        domains = list(base["domains"])
        yield f"\n{key[0]} at {base['n_bytes']:,} bytes ({key[1]}), windows of {key[2]}:\n"
        yield f"| | {' | '.join(dict.fromkeys(domains))} | all | KLD |"
        yield "|---" * (len(set(domains)) + 3) + "|"
        for row in group:
            cells = [f"{r:.2f}" for r in domain_ratios(row, base).values()]
            value, low, high = kld_ratio(row["kld"], base["kld"], domains)
            cells.append(f"{value:.2f} ({low:.2f}–{high:.2f})")
            yield f"| {row['recipe']} | {' | '.join(cells)} | {np.mean(row['kld']):.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--mixes", default="Q2_K,Q3_K_M,Q4_K_M,Q5_K_M")
    parser.add_argument("--n-ctx", type=int, nargs="+", default=[512])
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[3], help="windows per domain, of each --n-ctx"
    )
    parser.add_argument("--gptq", nargs="+", help="sources and sequences, as mix:48 or self:12")
    parser.add_argument("--recipes", nargs="+", choices=[r.name for r in RECIPES], help="not all")
    parser.add_argument("--llama", action="store_true", help="llama.cpp's mixes beside them")
    parser.add_argument("--calibration-ctx", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--folder", type=Path, default=Path("models/recipes"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/recipes.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if len(options.rounds) not in (1, len(options.n_ctx)):
        parser.error("--rounds: give one, or one for each --n-ctx")
    rounds = options.rounds * len(options.n_ctx) if len(options.rounds) == 1 else options.rounds
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        chosen = [r for r in RECIPES if options.recipes is None or r.name in options.recipes]
        wanted = list(token_recipes(options.gptq)) if options.gptq else chosen
        most = max((r.n_sequences for r in wanted if r.tokens == "mix"), default=FEW)
        for mix in options.mixes.split(","):
            recipes = [*(llama_recipes(mix, most) if options.llama else ()), *wanted]
            files = list(
                made(options.source, options.folder, mix, recipes, options.calibration_ctx)
            )
            for n_ctx, n_rounds in zip(options.n_ctx, rounds, strict=True):
                scores = score_held_out(
                    [path for _, path in files], options.source, n_ctx=n_ctx,
                    max_rounds=n_rounds, seconds=None,
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
