"""Whole runs of `ramgguf quantize` against llama.cpp's quantizer: time and peak memory.

    python bench/quantize.py models/smol768-bf16.gguf --runs 5
    python bench/random_models.py llama-1B 1B.gguf && python bench/quantize.py 1B.gguf --runs 3

Each run is a process of its own; the tools take turns, on the same source, at the same number of
threads. llama.cpp makes its Q4_K_M mix. ramgguf gets the bytes of that as its budget and measures,
plans, encodes and verifies; and, in the rows with `formats` the same, it is given llama.cpp's very
formats as a plan, and encodes and verifies only. Appends to bench/results/quantize.jsonl.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import child
import ramgguf
from provenance import provenance
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants import formats
from ramgguf.quants.encoders import EncoderName

RESULTS = Path(__file__).parent / "results" / "quantize.jsonl"
MIX = "Q4_K_M"


@dataclass(frozen=True)
class Run:
    """A tool's way to make the output; formats says who chooses them."""

    tool: str
    encoder: str
    formats: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One run: a line of the results."""

    model: str
    n_weights: int
    source_bytes: int
    tool: str
    encoder: str
    formats: str
    threads: int
    run: int
    seconds: float
    cpu_seconds: float
    weights_per_second: float
    rss_anon_bytes: int
    max_rss_bytes: int
    output_bytes: int
    stages: dict[str, float]


def runs(
    source: Path, folder: Path, encoders: Sequence[EncoderName], threads: int
) -> Iterator[Run]:
    """Yield llama.cpp's run and then ours, which need its output."""
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    python, script = sys.executable, str(Path(__file__).parent / "llama_quantize.py")
    yield Run(
        "llama_model_quantize", "reference", MIX,
        (python, script, str(source), str(theirs), MIX, str(threads)),
    )  # fmt: skip
    start = "from ramgguf.cli import main; main()"
    common = (
        *(python, "-c", start, "quantize", str(source), "-o", str(ours)),
        *("--force", "--json", "--quiet", "--threads", str(threads)),
    )
    for encoder in encoders:
        budget = str(theirs.stat().st_size)
        yield Run("ramgguf", encoder, "planned", (*common, "-b", budget, "--encoder", encoder))
    for encoder in encoders:
        plan = folder / f"{encoder}.plan.json"
        if not plan.exists():
            with open_gguf(theirs) as file:
                used = {t.type_name for t in file.tensors} & set(formats.quantized())
            measured = ramgguf.measure(
                source, formats=sorted(used), encoder=encoder, threads=threads
            )
            ramgguf.follow(measured, theirs).save(plan)
        yield Run("ramgguf", encoder, f"as {MIX}", (*common, "--plan", str(plan)))


def timed(source: Path, run: Run, number: int, threads: int) -> Row:
    done = child.run(run.command)
    stages = json.loads(done.stdout)["seconds"] if run.tool == "ramgguf" else {}
    output = Path(run.command[3] if not stages else run.command[6])
    with open_gguf(source) as file:
        n_weights, n_bytes = file.n_weights, file.n_bytes
    return Row(
        source.stem, n_weights, n_bytes, run.tool, run.encoder, run.formats, threads, number,
        done.seconds, done.cpu_seconds, n_weights / done.seconds, done.rss_anon_bytes,
        done.max_rss_bytes, output.stat().st_size, stages,
    )  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Print medians, and each tool's speed in relation to llama.cpp's."""
    kinds = list(dict.fromkeys((r.tool, r.encoder, r.formats) for r in rows))
    base = statistics.median(r.seconds for r in rows if r.tool != "ramgguf")
    for kind in kinds:
        own = [r for r in rows if (r.tool, r.encoder, r.formats) == kind]
        seconds = sorted(r.seconds for r in own)
        middle = statistics.median(seconds)
        anon = max(r.rss_anon_bytes for r in own) / 1e6
        print(
            f"{own[0].model} {' '.join(kind)}: {middle:.2f} s ({seconds[0]:.2f}–{seconds[-1]:.2f}),"
            f" {base / middle:.1f} ×, RssAnon {anon:.0f} MB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encoders", default="rtn,search")
    parser.add_argument("--scratch", type=Path, help="folder for outputs, by default the source's")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    arguments = parser.parse_args()
    encoders: list[EncoderName] = [e for e in ("rtn", "search") if e in arguments.encoders]
    rows = []
    scratch = arguments.scratch or arguments.source.parent
    with tempfile.TemporaryDirectory(dir=scratch) as folder, RESULTS.open("a") as out:
        for number in range(arguments.runs):
            for run in runs(arguments.source, Path(folder), encoders, arguments.threads):
                row = timed(arguments.source, run, number, arguments.threads)
                rows.append(row)
                line = asdict(row) | provenance() | {"note": arguments.note}
                out.write(json.dumps(line) + "\n")
                out.flush()
    show(rows)


if __name__ == "__main__":
    main()
