"""Time and memory against size: mixture-of-experts models of random weights, quantized whole.

    python bench/size.py --folder /scratch --sizes 0.3,1,3,10,31

The shape is that of a 30B-A3B (qwen3moe: 128 experts, width 2048), cut in layers; the smallest have
fewer experts and tokens, too. Each file is written, measured, planned, encoded and verified by
`ramgguf quantize` in a process of its own, and removed. Memory of the process's own (RssAnon) and
the bytes that the folder takes are sampled; what the kernel caches of files is told apart. Appends
to bench/results/size.jsonl and prints a table with an extrapolation.
"""

import argparse
import contextlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import child
import random_models
from provenance import provenance
from ramgguf.gguf.reader import open_gguf

RESULTS = Path(__file__).parent / "results" / "size.jsonl"
FULL = random_models.SHAPES["qwen3moe-30B"]
EXTRAPOLATED_GB = (60, 1300)


@dataclass(frozen=True)
class Row:
    """One run; bytes but for seconds. disk_bytes is the most that source and output took."""

    source_bytes: int
    output_bytes: int
    n_weights: int
    n_tensors: int
    n_layers: int
    n_experts: int
    encoder: str
    threads: int
    seconds: float
    cpu_seconds: float
    rss_anon_bytes: int
    max_rss_bytes: int
    cached_bytes: int
    disk_bytes: int
    stages: dict[str, float]


def shape_of(n_bytes: int) -> random_models.Shape:
    """Return the 30B-A3B shape cut to about n_bytes: whole layers where there is room for some."""
    if n_bytes >= 2.5e9:
        return random_models.cut(FULL, n_bytes)
    few = replace(FULL, n_vocab=16384, n_layers=1)
    sizes = [(abs(2 * random_models.n_weights(replace(few, n_experts=n)) - n_bytes), n)
             for n in range(8, 129, 8)]  # fmt: skip
    return replace(few, n_experts=min(sizes)[1])


def _cached_bytes() -> int:
    found = re.search(r"^Cached:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _watch(folder: Path, source: Path, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.2):
        with contextlib.suppress(FileNotFoundError):  # what is written changes its name
            files = [p.lstat() for p in {source, *folder.iterdir()}]
            peak[0] = max(peak[0], sum(512 * s.st_blocks for s in files))


def run(source: Path, folder: Path, encoder: str, threads: int, budget: str) -> Row:
    target = folder / "out.gguf"
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, source, peak, stop))
    watcher.start()
    start = "from ramgguf.cli import main; main()"
    done = child.run(
        (sys.executable, "-c", start, "quantize", str(source), "-o", str(target), "-b", budget,
         "--encoder", encoder, "--threads", str(threads), "--json", "--quiet")
    )  # fmt: skip
    stop.set()
    watcher.join()
    with open_gguf(source) as file:
        n_experts = file.metadata.integer("qwen3moe.expert_count") or 0
        row = Row(
            file.n_bytes, target.stat().st_size, file.n_weights, len(file.tensors),
            file.n_layers or 0, n_experts, encoder, threads, done.seconds, done.cpu_seconds,
            done.rss_anon_bytes, done.max_rss_bytes, _cached_bytes(), peak[0],
            json.loads(done.stdout)["seconds"],
        )  # fmt: skip
    target.unlink()
    return row


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown, with what a straight line through them foretells."""
    lines = [
        "| source | layers, experts | encoder | time | CPU time | ns/weight | RssAnon | disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {r.source_bytes / 1e9:.1f} GB | {r.n_layers}, {r.n_experts} | {r.encoder} "
        f"| {r.seconds:.1f} s | {r.cpu_seconds:.1f} s | {1e9 * r.cpu_seconds / r.n_weights:.1f} "
        f"| {r.rss_anon_bytes / 1e6:.0f} MB | {r.disk_bytes / 1e9:.1f} GB |"
        for r in rows
    )
    for encoder in dict.fromkeys(r.encoder for r in rows):
        own = [r for r in rows if r.encoder == encoder]
        if len(own) < 2:
            continue
        slope, base = np.polyfit([r.source_bytes for r in own], [r.cpu_seconds for r in own], 1)
        for gb in EXTRAPOLATED_GB:
            minutes = (base + slope * gb * 1e9) / 60
            lines.append(f"| {gb} GB, extrapolated | | {encoder} | | {minutes:.0f} min | | | |")
    return "\n".join(lines)


def sources(folder: Path, given: Path | None, sizes: str) -> Iterator[Path]:
    """Yield the given file, or models of these sizes in GB, each removed when it is done with."""
    if given is not None:
        yield given
        return
    for gb in map(float, sizes.split(",")):
        source = random_models.write(folder / "source.gguf", shape_of(int(gb * 1e9)))
        yield source
        source.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where there is room")
    parser.add_argument("--sizes", default="0.3,1,3,10,31", help="GB of the sources")
    parser.add_argument("--source", type=Path, help="measure this file instead, and keep it")
    parser.add_argument("--encoders", default="rtn,search")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", default="4.5bpw")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    arguments = parser.parse_args()
    folder = arguments.folder / "ramgguf-size"
    folder.mkdir()
    rows = []
    try:
        for source in sources(folder, arguments.source, arguments.sizes):
            for encoder in arguments.encoders.split(","):
                row = run(source, folder, encoder, arguments.threads, arguments.budget)
                rows.append(row)
                line = asdict(row) | provenance() | {"note": arguments.note}
                with RESULTS.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(row, flush=True)
    finally:
        shutil.rmtree(folder)
    print(table(rows))


if __name__ == "__main__":
    main()
