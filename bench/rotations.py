"""Rotations of V and of the residual stream, which nothing undoes at run time: what do they bring?

    python bench/rotations.py models/smol135d-f16.gguf --imatrix m.imatrix.gguf \
        --hessian m.hessian.gguf --formats Q4_0
    python bench/rotations.py models/smol135d-f16.gguf ... --pad --formats Q2_K IQ3_S --every 3
    python bench/rotations.py --table

    plain     the model
    values    V of each head rotated, and back in the output projection: a random Hadamard matrix
    folded    the gains of norms in what reads them, and a head of its own; nothing is rotated
    residual  `folded`, and the residual stream rotated, in the channels that are not zero: for a
              width of 2^k m, m odd, the Kronecker product of a Hadamard matrix of 2^k and a random
              orthogonal one of m, by QR, columns with random signs
    both      `values` and `residual`
    spread    `both`, into all channels, those of a padded model included

(QuaRot, arXiv 2404.00456, and SpinQuant, arXiv 2405.16406.) Each is written, run and compared with
the model. Then the matrices of every n-th layer are rounded by `search`, without an importance
matrix and with that of the variant's own inputs, or by `gptq` with its Hessians, and decoded; all
else stays F16, so that nothing but these matrices differs. n_bytes is what a file takes with all
layers in the format, embedding and head in Q8_0: a rotated model of a tied embedding has a head
beside it. Rows are added to
bench/results/rotations.jsonl; `--table` prints them: KLD over that of `plain`, 95 % intervals by
bootstrap over windows. `--folder` keeps variants for the next call.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from equivalents import (
    EMBEDDING,
    Model,
    exactness,
    fold_gains,
    pad,
    read_model,
    rotate_residual,
    rotate_values,
    write_hessians,
    write_matrix,
    write_model,
)
from paired import Row, add_rows, ratio, read_rows, scored
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders import ENCODERS
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.imatrix import Imatrix, load_imatrix
from rounded import in_threads, layer_matrices, rounded_copies

RESULTS = Path(__file__).parent / "results" / "rotations.jsonl"
VARIANTS = ("plain", "values", "folded", "residual", "both", "spread")


def change(model: Model, variant: str, seed: int) -> None:
    """Make the variant of the model."""
    values, residual = (np.random.default_rng((seed, i)) for i in range(2))
    if variant in ("values", "both", "spread"):
        rotate_values(model, values)
    if variant == "folded":
        fold_gains(model)
    if variant in ("residual", "both", "spread"):
        used = 1 + int(np.flatnonzero(model.weights[EMBEDDING].any(axis=0)).max())
        rotate_residual(model, residual, None if variant == "spread" else used)


def made(
    options: argparse.Namespace, imatrix: Imatrix, variant: str, folder: Path
) -> tuple[Path, Imatrix, float]:
    """Return the variant, its importance matrix, and its KLD to the source.

    They are made now or before; with the Hessians, where the encoder takes them.
    """
    source, seed, padded = options.source, options.seed, options.pad
    stem = folder / f"{source.stem}{'-padded' if padded else ''}-{variant}-{seed}"
    path, matrix, hessian, said = (
        stem.with_name(f"{stem.name}.{end}")
        for end in ("gguf", "imatrix.gguf", "hessian.gguf", "json")
    )
    with_hessian = ENCODERS[options.encoder].needs_hessian
    if not said.exists() or (with_hessian and not hessian.exists()):
        with open_gguf(source) as file:
            model = read_model(file)
            if padded:
                pad(model)
            change(model, variant, seed)
            write_model(model, file, path)
        write_matrix(model, imatrix, matrix)
        if with_hessian and imatrix.hessians is not None:
            write_hessians(model, imatrix.hessians, hessian)
        said.write_text(json.dumps(exactness(path, source)))
    found = load_imatrix(matrix, hessian if with_hessian else None)
    return path, found, json.loads(said.read_text())


def round_layers(
    path: Path, output: Path, format_: str, every: int, imatrix: Imatrix | None, encoder: str
) -> None:
    """Write the model with the matrices of every n-th layer rounded in the format, and decoded."""
    with open_gguf(path) as file, rounded_copies(path, [output]) as (data,):
        names = [n for n in layer_matrices(file) if (layer_of(n) or 0) % every == 0]
        unfit = [n for n in names if not formats.suits(format_, file.tensor(n).row_length)]
        if unfit:
            raise SystemExit(f"{path}: {format_} does not suit the rows of {unfit[0]}")

        def round_one(name: str) -> None:
            tensor = file.tensor(name)
            rows = file.read_rows(tensor, 0, tensor.n_rows)
            weights = ErrorWeights.of(tensor, imatrix)
            blocks = weights.encode(format_, tensor.type_name, rows, 0, tensor.row_length, encoder)
            after = in_type(tensor.type_name, decode_rows(format_, blocks, tensor.row_length))
            data[name][:] = after.view(data[name].dtype).reshape(data[name].shape)

        in_threads(round_one, names)


def file_bytes(file: GGUFFile, format_: str) -> int:
    """Return the bytes of the tensors with all layers' matrices in the format, all else in Q8_0."""
    layers = set(layer_matrices(file))
    total = 0
    for tensor in file.tensors:
        kind = format_ if tensor.name in layers else "F32" if tensor.n_rows == 1 else "Q8_0"
        total += formats.row_bytes(kind, tensor.row_length) * tensor.n_rows
    return total


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each file: its KLD, and that over the unrotated one's."""

    def kind(row: Mapping[str, object]) -> list[object]:
        return [row[k] for k in ("model", "format", "every", "encoder", "with_matrix", "n_ctx")]

    for row in sorted(rows, key=lambda row: str(kind(row))):
        theirs = next((r for r in rows if r["variant"] == "plain" and kind(r) == kind(row)), None)
        against = "" if theirs is None or theirs is row else f", × {ratio(row, theirs)}"
        how = f"{row['encoder']} {'with' if row['with_matrix'] else 'without'} matrix"
        yield (
            f"{row['model']}, {row['format']} in every {row['every']}, {how}: {row['variant']} "
            f"{row['n_bytes']:,} bytes, KLD {np.mean(row['kld']):.4f}{against}"
        )


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Write the variants and their rounded files, and return the files' rows."""
    imatrix = load_imatrix(options.imatrix, options.hessian)
    files: list[tuple[Row, Path]] = []
    for variant in options.variants:
        path, own, kld = made(options, imatrix, variant, folder)
        print(f"{variant}: KLD {kld:.2g}", flush=True)
        for format_ in options.formats:
            with open_gguf(path) as file:
                n_bytes = file_bytes(file, format_)
            for with_matrix in (w == "with" for w in options.matrix):
                output = folder / f"{variant}-{format_}-{with_matrix}.rounded.gguf"
                found = own if with_matrix else None
                round_layers(path, output, format_, options.every, found, options.encoder)
                row = {
                    "model": options.source.stem + (", padded" if options.pad else ""),
                    "variant": variant,
                    "seed": options.seed,
                    "exactness": kld,
                    "format": format_,
                    "every": options.every,
                    "encoder": options.encoder,
                    "with_matrix": with_matrix,
                    "n_bytes": n_bytes,
                }
                files.append((row, output))
    if not files:
        return []
    logits = folder / f"{options.source.stem}-{options.n_ctx}-{options.rounds}.logits"
    rows = scored(files, options.source, n_ctx=options.n_ctx, rounds=options.rounds, logits=logits)
    for _, path in files:
        path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--imatrix", type=Path, help="of the source")
    parser.add_argument("--hessian", type=Path, help="made with the matrix")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS[:-1]))
    parser.add_argument("--formats", nargs="*", default=["Q2_K", "IQ3_S"], help="none: only check")
    parser.add_argument("--matrix", nargs="+", choices=["with", "without"], default=["with"])
    parser.add_argument("--pad", action="store_true", help="rows to multiples of 256, before")
    parser.add_argument("--encoder", choices=["search", "gptq"], default="search")
    parser.add_argument("--every", type=int, default=1, help="round every n-th layer")
    parser.add_argument("--seed", type=int, default=0, help="of the rotations")
    parser.add_argument("--rounds", type=int, default=3, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=128, help="tokens of a window")
    parser.add_argument("--folder", type=Path, help="where variants are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            add_rows(options.out, measure(options, folder))
    keys = ("model", "variant", "format", "every", "encoder", "with_matrix", "n_ctx", "seed")
    print("\n".join(table(read_rows(options.out, *keys))))


if __name__ == "__main__":
    main()
