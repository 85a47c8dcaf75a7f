"""Rows padded with zeros to a multiple of 256, which K formats ask for: do they pay for the bytes?

    python bench/padding.py models/smol135d-f16.gguf --imatrix m.imatrix.gguf --bpw 3.6 4.0 4.4
    python bench/padding.py --table

Writes a model that computes the same with a residual stream of the next multiple of 256 channels,
the new ones zero, and as many query heads (of zeros) as make the rows of the output projection such
a multiple (`--keep-heads`: not these, where llama.cpp's graph allows it). Checks that by running
both. Then the original and the padded model get the same bytes, at bits per weight of the original:
`quantize --effort fast` with the importance matrix, of which the padded model has zeros for the new
columns. `--bpw min` is the smallest file that the original can have. Rows are added to
bench/results/padding.jsonl; `--table` prints them.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

import ramgguf
from equivalents import exactness, pad, read_model, write_matrix, write_model
from paired import Row, add_rows, ratio, read_rows, scored
from ramgguf.core.errors import BudgetError
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.imatrix import load_imatrix

RESULTS = Path(__file__).parent / "results" / "padding.jsonl"
# Points take 300 ns a weight and more: not by default.
FORMATS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
    *("MXFP4", "IQ4_NL", "Q4_0", "Q5_0", "Q8_0"),
)


def least_bytes(source: Path, imatrix: Path, formats: Sequence[str]) -> int:
    """Return the bytes of the smallest file that the model can have."""
    try:
        ramgguf.plan(ramgguf.measure(source, imatrix=imatrix, formats=formats), 1)
    except BudgetError as e:
        if e.smallest is not None:
            return e.smallest
        raise
    raise AssertionError(f"{source}: a file of one byte")


def files(
    models: dict[str, tuple[Path, Path]],
    bpw: Sequence[str],
    n_weights: int,
    formats: Sequence[str],
    folder: Path,
) -> Iterator[tuple[Row, Path]]:
    """Yield a row and a file for each model, with its matrix, and budget that it can keep to.

    The first is the original, of n_weights.
    """
    budgets: dict[str, int] = {}
    for name, (path, imatrix) in models.items():
        if not budgets:
            least = least_bytes(path, imatrix, formats) if "min" in bpw else 0
            budgets = {b: least if b == "min" else int(float(b) * n_weights / 8) for b in bpw}
        for asked, n_bytes in budgets.items():
            output = folder / f"{name}-{asked}.gguf"
            try:
                ramgguf.quantize(
                    path, n_bytes, output, effort="fast", imatrix=imatrix, verify=False,
                    formats=formats, force=True,
                )  # fmt: skip
            except BudgetError as e:
                print(f"{name} at {n_bytes:,} bytes: {e}")
                continue
            weights: Counter[str] = Counter()
            with open_gguf(output) as file:
                for tensor in file.tensors:
                    weights[tensor.type_name] += tensor.n_weights
            yield (
                {
                    "variant": name,
                    "asked": asked,
                    "budget": n_bytes,
                    "n_bytes": output.stat().st_size,
                    "shares": {k: round(n / weights.total(), 4) for k, n in weights.most_common()},
                },
                output,
            )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each file: its KLD, and that over the original's at the same bytes."""
    alike = itemgetter("model", "budget", "formats", "n_ctx")
    for row in rows:
        same = (r for r in rows if alike(r) == alike(row))
        theirs = next((r for r in same if r["variant"] == "original"), None)
        against = "" if theirs is None or theirs is row else f", × {ratio(row, theirs)}"
        mixture = ", ".join(f"{k} {share:.0%}" for k, share in row["shares"].items())
        yield (
            f"{row['model']}, {row['variant']}: {8 * row['n_bytes'] / row['n_weights']:.2f} bpw, "
            f"{row['n_bytes']:,} bytes, KLD {np.mean(row['kld']):.4f}{against} ({mixture})"
        )


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Write the padded model and the files of both, and return the files' rows."""
    name = "padded, heads kept" if options.keep_heads else "padded"
    path, imatrix = folder / "padded.gguf", folder / "padded.imatrix.gguf"
    with open_gguf(options.source) as source:
        model = read_model(source)
        pad(model, with_heads=not options.keep_heads)
        write_model(model, source, path)
        n_weights = source.n_weights
    kld = exactness(path, options.source)
    print(f"{name}: {model.width} channels, {model.n_heads} heads, KLD {kld:.2g}", flush=True)
    write_matrix(model, load_imatrix(options.imatrix), imatrix)
    del model
    models = {"original": (options.source, options.imatrix), name: (path, imatrix)}
    shared = {
        "model": options.source.stem,
        "n_weights": n_weights,
        "exactness": kld,
        "formats": " ".join(options.formats),
    }
    return scored(
        [
            ({**shared, **row}, file)
            for row, file in files(models, options.bpw, n_weights, options.formats, folder)
        ],
        options.source, n_ctx=options.n_ctx, rounds=options.rounds, logits=folder / "logits",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--imatrix", type=Path, help="of the source")
    parser.add_argument("--bpw", nargs="+", default=["min", "4.4", "4.6"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--keep-heads", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=128, help="tokens of a window")
    parser.add_argument("--folder", type=Path, help="where files are made, and removed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            add_rows(options.out, measure(options, Path(folder)))
    print(
        "\n".join(table(read_rows(options.out, "model", "variant", "budget", "formats", "n_ctx")))
    )


if __name__ == "__main__":
    main()
