"""What binding values to a sample of the model's data costs, as a share of a quantize run.

    python bench/identity.py model-f16.gguf

Each run quantizes the model with the encoder rtn, the fastest, after the file was dropped from the
page cache; the seconds that the sample takes are clocked within that same run. Rows are added to
bench/results/identity.jsonl.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import cached_property
from pathlib import Path

import ramgguf
from provenance import provenance
from ramgguf.gguf.reader import GGUFFile, open_gguf

SHARE = 0.05


def dropped(path: Path) -> None:
    """Drop the file's pages from the cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(model: Path, budget: str, folder: Path, threads: int) -> tuple[float, float]:
    """Return the seconds of a whole run, and those of its samples."""
    spent = 0.0
    whole = vars(GGUFFile)["sample_sha256"].func

    def clocked(file: GGUFFile) -> str:
        nonlocal spent
        start = time.perf_counter()
        found: str = whole(file)
        spent += time.perf_counter() - start
        return found

    clock = cached_property(clocked)
    clock.__set_name__(GGUFFile, "sample_sha256")
    original = vars(GGUFFile)["sample_sha256"]
    setattr(GGUFFile, "sample_sha256", clock)  # noqa: B010 (mypy knows it as read-only)
    dropped(model)
    start = time.perf_counter()
    try:
        ramgguf.quantize(
            model, budget, folder / "out.gguf", encoder="rtn", threads=threads, force=True
        )
    finally:
        setattr(GGUFFile, "sample_sha256", original)  # noqa: B010
    return time.perf_counter() - start, spent


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="4.5bpw")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    options = parser.parse_args()
    with open_gguf(options.model) as file:
        n_bytes, n_tensors = file.n_bytes, len(file.tensors)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs = [
            run(options.model, options.budget, Path(folder), options.threads)
            for _ in range(options.runs)
        ]
    shares = [sample / whole for whole, sample in runs]
    share = statistics.median(shares)
    row: dict[str, object] = {
        "bench": "identity",
        **provenance(),
        "model": options.model.name,
        "n_bytes": n_bytes,
        "n_tensors": n_tensors,
        "threads": options.threads,
        "run_seconds": [whole for whole, _ in runs],
        "sample_seconds": [sample for _, sample in runs],
        "share_median": share,
        "share_max": max(shares),
    }
    print(json.dumps(row))
    with (Path(__file__).parent / "results" / "identity.jsonl").open("a") as out:
        out.write(json.dumps(row) + "\n")
    if share > SHARE:
        raise SystemExit(f"the sample takes {share:.1%} of a run")


if __name__ == "__main__":
    main()
