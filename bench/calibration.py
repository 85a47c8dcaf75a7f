"""Calibrated plans against llama.cpp's mixes of the same bytes: mean KLD and PPL.

    python bench/calibration.py models/smol768-f16.gguf --imatrix self=self.imatrix.gguf \
        --sensitivity model.sens.json --mixes mixes/ --text held-out.txt

For every mix (Q3_K_M, Q4_K_M, Q5_K_M, made by llama.cpp itself): the mix, the mix that llama.cpp
makes with each importance matrix, and plans that fit its bytes with measured α only, with each
matrix only (by priors, and by two objectives of weighed errors), and with both; --hessian NAME=FILE
adds error feedback, in the formats of the last and in plans by its own errors. Scored on a text
that no calibration saw. Appends a line per file to bench/results/calibration.jsonl.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import ramgguf
from llama_quantize import quantize
from provenance import provenance
from ramgguf.evaluate.journal import read_results
from ramgguf.evaluate.result import EvalResult
from ramgguf.measure.result import Measurement
from ramgguf.quants.encoders import EncoderName
from scores import kld_ratio, scores

MIXES = ("Q4_K_M", "Q3_K_M", "Q5_K_M")


@dataclass(frozen=True)
class Recipe:
    """How a file is made: encoder, and what weighs its errors and its plan.

    own: planned by the errors of gptq, where `quantize` plans by those of search.
    """

    name: str
    encoder: EncoderName
    sensitivity: Path | None = None
    imatrix: Path | None = None
    hessian: Path | None = None
    objective: str | None = None
    own: bool = False


def recipes(arguments: argparse.Namespace) -> Iterator[Recipe]:
    """Yield those that the arguments ask for."""
    alpha = arguments.sensitivity
    if alpha:
        yield Recipe("alpha", "search", alpha)
    hessians = dict(arguments.hessian)
    for name, path in arguments.imatrix:
        yield Recipe(f"priors + imatrix {name}", "search", imatrix=path)
        yield Recipe(f"activation {name}", "search", imatrix=path, objective="activation")
        yield Recipe(f"output {name}", "search", imatrix=path, objective="output")
        if alpha:
            yield Recipe(f"alpha + imatrix {name}", "search", alpha, path)
        if name in hessians:
            yield Recipe(f"alpha + gptq {name}", "gptq", alpha, path, hessians[name], own=True)
            yield Recipe(f"alpha + imatrix {name} + gptq", "gptq", alpha, path, hessians[name])


@cache
def measure(
    source: Path,
    encoder: EncoderName,
    imatrix: Path | None,
    hessian: Path | None,
    threads: int,
    formats: tuple[str, ...] | None,
) -> Measurement:
    """Return the curves, which several recipes may share."""
    return ramgguf.measure(
        source, encoder=encoder, imatrix=imatrix, hessian=hessian, threads=threads, formats=formats
    )


def make(arguments: argparse.Namespace, recipe: Recipe, budgets: dict[str, int]) -> list[Path]:
    """Write the recipe's file for every budget that is not there yet; return them."""
    folder: Path = arguments.mixes
    tag = recipe.name.replace(" + ", "-").replace(" ", "-")
    paths = {mix: folder / f"{tag}-{mix}.gguf" for mix in budgets}
    if all(path.exists() for path in paths.values()):
        return list(paths.values())
    if recipe.encoder == "gptq" and not recipe.own:
        return feed_back(arguments, recipe, budgets, paths)
    measured = measure(
        arguments.source, recipe.encoder, recipe.imatrix, recipe.hessian, arguments.threads,
        tuple(arguments.formats) if arguments.formats and recipe.hessian else None,
    )  # fmt: skip
    alpha = None
    if recipe.sensitivity:
        alpha = ramgguf.reweigh(
            recipe.sensitivity, arguments.source, recipe.imatrix, hessian=recipe.hessian
        )
    for mix, n_bytes in budgets.items():
        if not paths[mix].exists():
            ramgguf.quantize(
                arguments.source, n_bytes, paths[mix], measurement=measured, sensitivity=alpha,
                objective="sensitivity" if alpha else recipe.objective, verify=False,
                threads=arguments.threads,
            )  # fmt: skip
    return list(paths.values())


def feed_back(
    arguments: argparse.Namespace, recipe: Recipe, budgets: dict[str, int], paths: dict[str, Path]
) -> list[Path]:
    """Write the files as `quantize --encoder gptq` does: in the formats of the searched plans."""
    assert recipe.sensitivity is not None
    alpha = ramgguf.reweigh(recipe.sensitivity, arguments.source, recipe.imatrix)
    for mix, n_bytes in budgets.items():
        if not paths[mix].exists():
            ramgguf.quantize(
                arguments.source, n_bytes, paths[mix], encoder="gptq", imatrix=recipe.imatrix,
                hessian=recipe.hessian, sensitivity=alpha, objective="sensitivity", verify=False,
                threads=arguments.threads,
            )  # fmt: skip
    return list(paths.values())


def wanted(arguments: argparse.Namespace, name: str) -> bool:
    """Return whether --recipes asks for it: its name, in full."""
    return not arguments.recipes or name in arguments.recipes


def weighed_mix(arguments: argparse.Namespace, mix: str, name: str, imatrix: Path) -> Path:
    """Return llama.cpp's file of the mix, fitted with the importance matrix."""
    path = arguments.mixes / f"{mix}-imatrix-{name}.gguf"
    return quantize(arguments.source, path, mix, imatrix=imatrix, threads=arguments.threads)


def named(text: str) -> tuple[str, Path]:
    """Return the name and the file of NAME=FILE."""
    name, _, path = text.partition("=")
    return name, Path(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--mixes", type=Path, required=True, help="folder for all files")
    parser.add_argument("--only", nargs="*", default=list(MIXES))
    parser.add_argument("--recipes", nargs="*", help="only those of these names")
    parser.add_argument("--imatrix", type=named, action="append", default=[])
    parser.add_argument("--hessian", type=named, action="append", default=[])
    parser.add_argument("--formats", nargs="*", help="to try with Hessians, by default all: slow")
    parser.add_argument("--sensitivity", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--make-only", action="store_true")
    parser.add_argument("--journal", type=Path, help="JSON lines of the scores, to go on from")
    parser.add_argument("--partial", action="store_true", help="take what --journal has as yet")
    parser.add_argument("--out", type=Path, default=Path("bench/results/calibration.jsonl"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.mixes.mkdir(exist_ok=True)
    mixes = {
        mix: quantize(arguments.source, arguments.mixes / f"{mix}.gguf", mix, threads=1)
        for mix in arguments.only
    }
    budgets = {mix: path.stat().st_size for mix, path in mixes.items()}
    files = [("mix", mix, path) for mix, path in mixes.items()]
    for name, imatrix in arguments.imatrix:
        if wanted(arguments, f"mix + imatrix {name}"):
            files += [
                (f"mix + imatrix {name}", mix, weighed_mix(arguments, mix, name, imatrix))
                for mix in mixes
            ]
    for recipe in recipes(arguments):
        if wanted(arguments, recipe.name):
            made = make(arguments, recipe, budgets)
            files += [(recipe.name, mix, path) for mix, path in zip(budgets, made, strict=True)]
    if arguments.make_only:
        return
    report(arguments, scored(arguments, files))


def scored(
    arguments: argparse.Namespace, files: list[tuple[str, str, Path]]
) -> dict[tuple[str, str], EvalResult]:
    """Return the results by recipe and mix; with --partial those that the journal has as yet."""
    if not arguments.partial:
        found = ramgguf.evaluate(
            [path for *_, path in files], arguments.source, text=arguments.text, n_ctx=512,
            n_seq=arguments.n_seq, threads=arguments.threads, jsonl=arguments.journal, resume=True,
        ).results  # fmt: skip
        return {(n, m): r for (n, m, _), r in zip(files, found, strict=True)}
    by_path = {r.model.path: r for r in read_results(arguments.journal) if r.sequences}
    return {(n, m): by_path[str(path)] for n, m, path in files if str(path) in by_path}


def in_common(a: EvalResult, b: EvalResult) -> tuple[EvalResult, EvalResult]:
    """Return both with the sequences only that both have scored."""
    shared = {s.index for s in a.sequences} & {s.index for s in b.sequences}
    first, second = (
        r.model_copy(update={"sequences": tuple(s for s in r.sequences if s.index in shared)})
        for r in (a, b)
    )
    return first, second


def report(arguments: argparse.Namespace, found: dict[tuple[str, str], EvalResult]) -> None:
    """Print and append a row for each file, on the sequences that it shares with its mix."""
    with arguments.out.open("a") as out:
        for (name, mix), result in found.items():
            ours, theirs = in_common(result, found["mix", mix])
            row = {
                "model": arguments.source.stem,
                "recipe": name,
                "mix": mix,
                "n_bytes": result.model.n_bytes,
                **asdict(scores(ours)),
                "of_mix": asdict(kld_ratio(ours, theirs)),
                "n_seq": len(ours.sequences),
                **provenance(),
            }
            print(row)
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
