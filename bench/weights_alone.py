"""How much of a file's KLD its weights make, and how much its kernels, which round inputs.

    python bench/weights_alone.py models/qwen05d-f16.gguf mix.gguf ours.gguf
    python bench/weights_alone.py --table

llama.cpp multiplies quantized weights with inputs rounded to 8 bits, in blocks. So each file
is scored as it is, and decoded into the source's types, whose kernels round them to F16 only. The
windows are those of the mix's `score` part. Rows are added to
bench/results/weights_alone.jsonl; `--table` prints KLDs, and their ratios to the first file
of each run as the file is and decoded, with 95 % intervals by bootstrap over windows, paired.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paired import Row, add_rows, kld_ratio, read_rows, scored
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.decoded import write_decoded

RESULTS = Path(__file__).parent / "results" / "weights_alone.jsonl"


def rows(source: Path, files: Sequence[Path], folder: Path, n_ctx: int, rounds: int) -> list[Row]:
    """Return a row for each file as it is, and one for its weights alone."""
    found: list[Row] = []
    for file in files:
        row: Row = {
            "model": source.stem,
            "base": files[0].stem,
            "file": file.stem,
            "n_bytes": file.stat().st_size,
        }
        with open_gguf(file) as quantized, open_gguf(source) as original:
            decoded = write_decoded(quantized, original, folder / "decoded.gguf", threads=2)
        pair = [({**row, "is_decoded": False}, file), ({**row, "is_decoded": True}, decoded)]
        logits = folder / "logits"
        found += scored(
            pair, source, n_ctx=n_ctx, rounds=rounds, logits=logits, part="score"
        )  # fmt: skip
        decoded.unlink()
    return found


def table(path: Path) -> None:
    """Print a Markdown table of the rows."""
    found = read_rows(path, "model", "base", "file", "is_decoded")
    print("| | bytes | KLD | of the weights alone | ratio | of the weights alone |")
    print("|---|---|---|---|---|---|")
    for row in found:
        if row["is_decoded"]:
            continue
        cells = []
        for is_decoded in (False, True):
            alike = [
                r for r in found
                if (r["model"], r["base"]) == (row["model"], row["base"])
                and r["is_decoded"] is is_decoded
            ]  # fmt: skip
            mine = next(r for r in alike if r["file"] == row["file"])
            base = next(r for r in alike if r["file"] == row["base"])
            value, low, high = kld_ratio(mine["kld"], base["kld"], base["domains"])
            cells.append((np.mean(mine["kld"]), f"{value:.2f} ({low:.2f}–{high:.2f})"))
        (kld, ratio), (of_weights, ratio_of_weights) = cells
        print(
            f"| {row['file']} | {row['n_bytes']:,} | {kld:.5f} | {of_weights:.5f} | {ratio} "
            f"| {ratio_of_weights} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2, help="windows per domain")
    parser.add_argument("--scratch", type=Path, help="folder for decoded files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        if options.source is None or not options.files:
            parser.error("name the source and its files")
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            add_rows(
                options.out,
                rows(options.source, options.files, Path(folder), options.n_ctx, options.rounds),
            )
    table(options.out)


if __name__ == "__main__":
    main()
