"""Passes over a model under a limit of half its size: peak memory against what is planned.

    python bench/memory_limit.py models/qwen05-f16.gguf

Calibration that draws, and that reads; Hessians; sensitivities; swaps; reference logits; scores:
each is a command of its own. It and its children run under RLIMIT_DATA (a limit on memory of their
own, as `ulimit -d` sets it) of half the source's bytes each, after the source's pages were dropped
from the page cache. The model itself is mapped: its pages are not memory of the process's own, and
the kernel drops them when memory is short.

Recorded are the peaks of RssAnon (20 ms apart) of the largest process and of all together, and the
same of a run without the limit. Planned is what the choice of a stand-in keeps free beside the
model, with the Hessians that are held at a time. Few tokens: memory is by tokens at a time, not by
how many there are. Appends a line per run to bench/results/memory_limit.jsonl.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from provenance import provenance
from ramgguf.core.units import format_bytes, parse_size
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.stand_in import BESIDE_BYTES

RESULTS = Path(__file__).parent / "results" / "memory_limit.jsonl"
HESSIANS = "64MB"  # at a time
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """A command under a limit (0: none): its peaks in bytes, and what it said of a stand-in."""

    model: str
    action: str
    source_bytes: int
    limit_bytes: int
    planned_bytes: int
    peak_process_bytes: int
    peak_all_bytes: int
    seconds: float
    exit_code: int
    said: str


def actions(model: Path, folder: Path, small: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Yield the name of each action, the bytes of Hessians that it holds, and its command."""
    out = [str(folder / "out"), "--force", "--threads", "1"]
    read = ["calibrate", str(model), "--tokens", "mix", "--sequences", "2", "--context", "256"]
    drawn = ["calibrate", str(model), "--tokens", "self", "--sequences", "64", "--context", "16"]
    alpha = ["sensitivity", str(model), "--sequences", "1", "--context", "16"]
    yield "draw and capture", 0, [*drawn, "-o", *out]
    yield "read and capture", 0, [*read, "-o", *out]
    hessian = ["--hessian", str(folder / "h"), "--hessian-memory", HESSIANS]
    hessian += ["--hessian-tensors", r"blk\.[0-3]\.attn_q"]
    yield "read, with Hessians", parse_size(HESSIANS), [*read, *hessian, "-o", *out]
    alphas = [str(folder / "alphas"), *out[1:]]
    yield "sensitivities", 0, [*alpha, "-o", *alphas]
    refine = ["quantize", str(model), "--budget", "5bpw", "--refine", "2"]
    yield "swaps", 0, [*refine, "--sensitivity", alphas[0], "-o", *out]
    windows = ["--seq-len", "256", "--n-seq", "1", "--threads", "1"]
    logits = str(folder / "logits")  # with them, one model is held at a time
    yield "reference logits", 0, ["eval", str(model), "--save-logits", logits, *windows]
    score = ["eval", str(small), "--reference-logits", logits, "--safe-kernels", *windows]
    yield "score", 0, score


def dropped(path: Path) -> None:
    """Take the file's pages out of the page cache, as far as nothing else uses them."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(
    model: Path, action: str, extra: int, command: Sequence[str], limit: int, n_bytes: int
) -> Run:
    dropped(model)

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    start = time.perf_counter()
    entry = "from ramgguf.cli import main; main()"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", entry, *command],
            stdout=output, stderr=subprocess.STDOUT, preexec_fn=limited,
        )  # fmt: skip
        stop, peaks = threading.Event(), [0, 0]
        sampler = threading.Thread(target=_sample, args=(process.pid, peaks, stop))
        sampler.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        stop.set()
        sampler.join()
        output.seek(0)
        lines = output.read().splitlines()
    wanted = [line for line in lines if "stand-in" in line or line.startswith("error")]
    said = " ".join(wanted or lines[-3:] * bool(code))
    said = re.sub(r"/(?:[^\s/]+/)+", "", said)  # names of files, not of folders
    return Run(
        model.stem, action, n_bytes, limit, BESIDE_BYTES + extra, peaks[0], peaks[1], seconds, code,
        said[:300],
    )  # fmt: skip


def _sample(pid: int, peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_SECONDS):
        each = [_rss_anon(p) for p in _tree(pid)]
        peaks[0] = max(peaks[0], *each, 0)
        peaks[1] = max(peaks[1], sum(each))


def _tree(pid: int) -> Iterator[int]:
    """Yield the process and what it and its threads have started."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = [int(child) for child in children.read_text().split()]
        except OSError:  # the thread has ended
            continue
        for child in found:
            yield from _tree(child)


def _rss_anon(pid: int) -> int:
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, help="folder for outputs, by default the system's")
    parser.add_argument("--actions", help="a regular expression: only those whose name it finds")
    parser.add_argument("--unlimited", action="store_true", help="each also without the limit")
    arguments = parser.parse_args()
    with (
        open_gguf(arguments.model) as file,
        tempfile.TemporaryDirectory(dir=arguments.scratch) as name,
        RESULTS.open("a") as out,
    ):
        folder = Path(name)
        small = folder / "small.gguf"
        make = ["quantize", str(arguments.model), "-b", "5bpw", "-o", str(small)]
        entry = "from ramgguf.cli import main; main()"
        plain = ["--effort", "fast", "--encoder", "rtn", "--threads", "1", "--quiet"]
        subprocess.run([sys.executable, "-c", entry, *make, *plain], check=True)
        for action, extra, command in actions(arguments.model, folder, small):
            if arguments.actions and not re.search(arguments.actions, action):
                continue
            for limit in [file.n_bytes // 2] + [0] * arguments.unlimited:
                run = measured(arguments.model, action, extra, command, limit, file.n_bytes)
                out.write(json.dumps(asdict(run) | provenance()) + "\n")
                out.flush()
                print(
                    f"{run.model} {action}, limit {format_bytes(limit)}: exit {run.exit_code}, "
                    f"peak {format_bytes(run.peak_process_bytes)} of a process, "
                    f"{format_bytes(run.peak_all_bytes)} of all, planned "
                    f"{format_bytes(run.planned_bytes)}; {run.seconds:.0f} s; {run.said}"
                )


if __name__ == "__main__":
    main()
