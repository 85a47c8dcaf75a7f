"""Efforts at equal bytes: llama.cpp's mixes with and without a matrix, fast, auto and best.

    python bench/effort.py models/smol768-f16.gguf --mixes Q4_K_M,Q3_K_M --efforts fast,auto

At the bytes of each of llama.cpp's mixes, `ramgguf quantize` runs with each effort in a process of
its own and is timed. llama.cpp's mix gets the importance matrix that auto made: the same tokens for
both. All files are then scored side by side on the package's `score` texts of every domain, which
nothing else has read, from the 8th token of a window on. `--flags TYPE:EMBEDDING` adds another of
llama.cpp's types and its embedding's, with that matrix; `--flags best` makes those that should lose
least by the sensitivities which `best` has kept, and adds the best on the `gate` texts. Rows are
added to the results file; what is there is not done again. `--table` prints the results, ratios to
the mix with a matrix, 95 % intervals by bootstrap over windows, paired.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

import numpy as np

import ramgguf
from baselines import all_flags
from contenders import likeliest
from llama_quantize import NEED_MATRIX
from llama_quantize import quantize as llama_quantize
from paired import kld_ratio
from provenance import provenance
from ramgguf.evaluate import HeldOutScore, score_held_out
from ramgguf.measure.result import Measurement
from ramgguf.quantize.schedule import GATE_CTX
from ramgguf.sensitivity import Sensitivity

MIXES = ("Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K")
BASE = "mix with matrix"
FLAGS = "flags with matrix"
ORDER = ("mix", BASE, FLAGS, "fast", "matrix step", "auto", "best")
LEAST_WINDOWS = 3  # per domain, for an interval


@dataclass(frozen=True)
class Row:
    """A file's KLD in nats per token by window, and the domain of each; seconds to make it."""

    model: str
    mix: str
    contender: str
    n_bytes: int
    n_ctx: int
    domains: tuple[str, ...]
    kld: tuple[float, ...]
    first_kld: tuple[float, ...]
    seconds: float
    notes: tuple[str, ...]
    engine: str
    cpu: str
    commit: str


class Said(TypedDict):
    """What a run says of the file that it made."""

    seconds: float
    notes: list[str]


def ours(
    source: Path, output: Path, n_bytes: int, effort: str, limit: str | None, has_scales: bool
) -> Said:
    """Quantize by the command line; return its seconds, and what the plan's notes say."""
    program = "from ramgguf.cli import main; main()"
    if not has_scales:
        program = (
            f"from ramgguf.quantize import effort; effort.can_scale = lambda _: False; {program}"
        )
    command = [sys.executable, "-c", program, "quantize", str(source), "--budget", str(n_bytes)]
    command += ["-o", str(output), "--effort", effort]
    command += ["--no-score", "--json", "--force"]
    command += ["--time", limit] if limit and effort != "fast" else []
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"seconds": time.perf_counter() - start, "notes": json.loads(done.stdout)["notes"]}


def kept_folder(source: Path) -> Path:
    """Return where efforts keep what they have measured."""
    return source.parent / f"{source.stem}.effort"


@cache
def measured(source: Path) -> Measurement:
    """Return the model's curves, which take minutes, measured once for all mixes."""
    return ramgguf.measure(source)


def matrix_of(source: Path) -> Path | None:
    """Return the matrix from most tokens that an effort has kept."""
    found = kept_folder(source).glob("mix-*.imatrix.gguf")
    return max(found, key=lambda p: int(p.name.split("-")[1].partition("x")[0]), default=None)


def rows(
    source: Path, mix: str, efforts: Sequence[str], done: set[str], options: argparse.Namespace
) -> Iterator[Row]:
    """Make what is missing at the mix's bytes, and yield its rows."""
    made: dict[str, tuple[Path, Said]] = {}
    folder: Path = options.folder
    plain = base = folder / f"{source.stem}-{mix}.gguf"
    if mix in NEED_MATRIX:
        base = folder / f"{source.stem}-{mix}-matrix.gguf"
        llama_quantize(source, base, mix, imatrix=matrix_of(source))
    else:
        llama_quantize(source, plain, mix)
    budget = base.stat().st_size
    for effort in efforts:
        if effort in done:
            continue
        path = folder / f"{source.stem}-{mix}-{effort}.gguf"
        about = path.with_suffix(".json")
        if not (path.exists() and about.exists()):
            about.write_text(
                json.dumps(ours(source, path, budget, effort, options.time, options.has_scales))
            )
        made[effort] = path, json.loads(about.read_text())
    if "mix" not in done and mix not in NEED_MATRIX:
        made["mix"] = plain, {"seconds": 0.0, "notes": []}
    matrix = matrix_of(source)
    if BASE not in done and matrix is not None:
        path = folder / f"{source.stem}-{mix}-matrix.gguf"
        written = llama_quantize(source, path, mix, imatrix=matrix)
        made[BASE] = written, {"seconds": 0.0, "notes": [matrix.name]}
    if options.flags and FLAGS not in done and matrix is not None:
        path = folder / f"{source.stem}-{mix}-flags.gguf"
        choice: str | None = options.flags
        if choice == "best":
            choice = best_flags(source, mix, path, matrix)
        else:
            with_flags(source, path, options.flags, matrix, budget)
        if choice is not None:
            made[FLAGS] = path, {"seconds": 0.0, "notes": [choice, matrix.name]}
    if not made or options.make:
        return
    files = [path for path, _ in made.values()]
    later = score_held_out(
        files, source, n_ctx=options.n_ctx, max_rounds=options.rounds, seconds=None, threads=2
    )
    first = score_held_out(
        files, source, n_ctx=16, first_target=1, max_rounds=6, seconds=None, threads=2
    )
    origin = provenance()
    for (name, (path, said)), score, short in zip(made.items(), later, first, strict=True):
        print(f"{mix} {name}: KLD {score.overall().kld.value:.4f}", flush=True)
        yield Row(
            model=source.stem,
            mix=mix,
            contender=name,
            n_bytes=path.stat().st_size,
            n_ctx=options.n_ctx,
            domains=tuple(w.domain for w in score.windows),
            kld=_klds(score),
            first_kld=_klds(short),
            seconds=round(said["seconds"], 1),
            notes=tuple(said["notes"]),
            engine=score.engine,
            cpu=origin["cpu"],
            commit=origin["commit"],
        )


def with_flags(source: Path, path: Path, choice: str, matrix: Path, budget: int) -> None:
    """Write llama.cpp's file of the choice, TYPE:EMBEDDING, with the matrix."""
    file_type, _, embedding = choice.partition(":")
    path.unlink(missing_ok=True)
    llama_quantize(source, path, file_type, token_embedding=embedding or None, imatrix=matrix)
    if path.stat().st_size > budget:
        raise SystemExit(f"{choice} takes {path.stat().st_size} bytes, not {budget}")


def best_flags(source: Path, mix: str, path: Path, matrix: Path) -> str | None:
    """Write llama.cpp's file of the best types at the mix's bytes, and return TYPE:EMBEDDING; None
    where that is the mix itself.

    With the matrix, the choices that are expected to be best are made and scored on the `gate`
    texts. The sensitivities are those that best has kept.
    """
    (sensitivity,) = kept_folder(source).glob("*.sens.json")
    choices = all_flags(source, path.parent)
    budget = next(f.n_bytes for f in choices if f.label == f"{mix}-default")
    near = likeliest(choices, budget, measured(source), Sensitivity.load(sensitivity))
    with TemporaryDirectory(dir=path.parent) as scratch:
        files = [
            llama_quantize(
                source, Path(scratch) / f"{f.label}.gguf", f.file_type,
                token_embedding=f.embedding, imatrix=matrix,
            )
            for f in near
        ]  # fmt: skip
        scores = score_held_out(
            files, source, part="gate", n_ctx=GATE_CTX, max_rounds=3, seconds=None, threads=2
        )
        klds = [score.overall().kld.value for score in scores]
        for flags, kld in zip(near, klds, strict=True):
            print(f"{mix} {flags.label}: KLD {kld:.4f} on gate texts", flush=True)
        chosen = int(np.argmin(klds))
        best = near[chosen]
        if best.label == f"{mix}-default":
            return None
        files[chosen].replace(path)
    return f"{best.file_type}:{best.embedding or ''}"


def _klds(score: HeldOutScore) -> tuple[float, ...]:
    return tuple(round(w.kld_sum / w.n_tokens, 6) for w in score.windows)


def table(found: Sequence[Row]) -> Iterator[str]:
    """Yield a Markdown table per model, mix and context: ratios to the mix with a matrix."""
    for model, mix, n_ctx in dict.fromkeys((r.model, r.mix, r.n_ctx) for r in found):
        group = {r.contender: r for r in found if (r.model, r.mix, r.n_ctx) == (model, mix, n_ctx)}
        base = group.get(BASE)
        if base is None:
            continue
        domains = tuple(dict.fromkeys(base.domains))
        n = len(base.kld) // len(domains)
        yield f"\n{model} at {base.n_bytes:,} bytes ({mix}), {n} windows of {n_ctx} per domain:\n"
        yield f"| | {' | '.join(domains)} | all | first tokens, nats | time |"
        yield "|---" * (len(domains) + 4) + "|"
        for name in ORDER:
            if name in group:
                cells = [ratio(group[name], base, d) for d in (*domains, None)]
                shorts = group[name].first_kld
                first = f"{np.mean(shorts):.3f}" if shorts else ""
                spent = f"{group[name].seconds:.0f} s" if group[name].seconds else ""
                yield f"| {name} | {' | '.join(cells)} | {first} | {spent} |"


def ratio(row: Row, base: Row, domain: str | None) -> str:
    """Return the mean KLD over the base's, and its interval; of the base, the KLD itself."""
    wanted = [i for i, d in enumerate(base.domains) if domain in (d, None)]
    mine, theirs = [row.kld[i] for i in wanted], [base.kld[i] for i in wanted]
    if row.contender == BASE:
        return f"1 ({np.mean(theirs):.4f})"
    value, low, high = kld_ratio(mine, theirs, [base.domains[i] for i in wanted])
    if min(base.domains.count(d) for d in base.domains) < LEAST_WINDOWS:
        return f"{value:.2f}"
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--efforts", default="fast,auto,best")
    parser.add_argument("--flags", help="llama.cpp's others at these bytes: IQ4_XS:Q4_K, best")
    parser.add_argument("--time", help="what each of auto and best may take: 10m")
    parser.add_argument(
        "--no-scales", action="store_false", dest="has_scales", help="leave column scales out"
    )
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8, help="windows per domain")
    parser.add_argument("--folder", type=Path, default=Path("models/llama"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/effort.jsonl"))
    parser.add_argument("--make", action="store_true", help="only make files, score them later")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    found: list[Row] = []
    if options.out.exists():
        found = [Row(**json.loads(line)) for line in options.out.read_text().splitlines()]
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        for mix in options.mixes.split(","):
            here = (options.source.stem, mix, options.n_ctx)
            done = {r.contender for r in found if (r.model, r.mix, r.n_ctx) == here}
            for row in rows(options.source, mix, options.efforts.split(","), done, options):
                found.append(row)
                with options.out.open("a") as out:
                    out.write(json.dumps(asdict(row)) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
