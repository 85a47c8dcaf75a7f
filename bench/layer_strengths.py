"""Whether the strength of column scales is better chosen for each layer and place, as AWQ does.

    python bench/layer_strengths.py models/smol135d-f16.gguf --imatrix I.gguf --hessian H.gguf

`transform` has one strength, the exponent of the inputs' mean squares, for all folds: norms and
what reads them, up and down, V and the projection. AWQ (Lin et al. 2023, arXiv 2306.00978) searches
one for each. Here each fold gets, of the strengths, that with the least output error on the
Hessian's tokens, Σ eHeᵀ / Σ wHwᵀ added up over the matrices that read it, when some of their rows
are rounded in the format by the encoder. Then every matrix of a layer is rounded so with these
scales, and with each single strength, and scored on held-out windows: KLD as a ratio to that of the
first strength. `picked by kind` has one strength for all folds of a kind. Prints what was picked,
and adds a row for each file to bench/results/layer_strengths.jsonl.
"""

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from provenance import provenance
from ramgguf.core.parallel import default_threads
from ramgguf.gguf.architecture import part_of
from ramgguf.gguf.folds import Fold
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants import formats
from ramgguf.quants.encoders import EncoderName, encoder
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.encoders.points import searched
from ramgguf.quants.hessian import Hessian, Hessians, load_hessians
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.transform.scaling import Moves, _chosen
from rounded import (
    Blocks,
    Floats,
    in_threads,
    layer_matrices,
    print_klds,
    put_rounded,
    rounded_copies,
)

Doubles = NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "layer_strengths.jsonl"


@dataclass(frozen=True)
class Rounding:
    """How matrices are rounded: by the encoder in the format, on the Hessians' tokens."""

    encoder: EncoderName
    format: str
    hessians: Hessians

    def gram(self, name: str, n_columns: int) -> Floats:
        """Return XᵀX of the matrix's inputs."""
        found = self.hessians.get(name, n_columns)
        assert found is not None
        return found

    def encode(self, weights: Floats, gram: Floats, columns: Floats) -> Blocks:
        """Return blocks of the scaled rows; inputs are divided by the scales."""
        by_output = encoder(self.encoder).encode_output
        if by_output is None:
            means = gram.diagonal() / self.hessians.n_tokens
            return searched(self.format, weights, (means / columns**2).astype(np.float32))
        hessian = Hessian.of(gram, self.hessians.n_tokens, scales=columns)
        importance = np.ascontiguousarray(hessian.mean.diagonal(), np.float32)
        return by_output(self.format, weights, hessian, importance)


def columns_of(moves: Moves) -> dict[str, Floats]:
    """Return what the columns of each reader are multiplied with."""
    return {
        name: by_row[0, fold.row_of].astype(np.float32)
        for fold, by_row in moves
        for name in fold.readers
    }


def output_errors(
    source: GGUFFile, how: Rounding, tried: list[dict[str, Floats]], n_rows: int
) -> dict[str, Doubles]:
    """Return the relative output error of each matrix under each choice of scales, (tried,).

    It is that of n_rows rows, spread over the matrix.
    """

    def of(name: str) -> Doubles:
        tensor = source.tensor(name)
        rows = source.read_rows(tensor, 0, tensor.n_rows)[:: max(1, tensor.n_rows // n_rows)]
        weights = decode_rows(tensor.type_name, np.ascontiguousarray(rows), tensor.row_length)
        gram, found = how.gram(name, tensor.row_length), []
        for columns in (scales[name] for scales in tried):
            blocks = how.encode(weights * columns, gram, columns)
            off = weights - decode_rows(how.format, blocks, tensor.row_length) / columns
            found.append(_squares(off, gram))
        return np.array(found) / _squares(weights, gram)

    return dict(zip(tried[0], in_threads(of, tried[0]), strict=True))


def _squares(rows: Floats, gram: Floats) -> float:
    """Return Σ eHeᵀ over the rows e."""
    return float(np.einsum("ij,ij->", rows @ gram, rows, dtype=np.float64))


def kind(source: GGUFFile, fold: Fold) -> str:
    """Return what the fold is between: the first of its writers and of its readers."""
    ends = (part_of(name, source.architecture) for name in (fold.writers[0], fold.readers[0]))
    return " to ".join(ends)


def picked(moves: list[Moves], best: NDArray[np.intp]) -> Moves:
    """Return each fold with its scales of the chosen strength."""
    return [moves[at][number] for number, at in enumerate(best)]


def rounded(source: GGUFFile, how: Rounding, output: Path, columns: dict[str, Floats]) -> None:
    """Write the model with the matrices of its layers rounded with these scales."""

    def put(name: str) -> None:
        n = source.tensor(name).row_length
        gram, scales = how.gram(name, n), columns.get(name, np.ones(n, np.float32))
        put_rounded(
            source, data, name, how.format, lambda rows: how.encode(rows, gram, scales), scales
        )

    matrices = (source.tensor(name) for name in layer_matrices(source))
    names = [t.name for t in matrices if formats.suits(how.format, t.row_length)]
    with rounded_copies(source.paths[0], [output]) as (data,):
        in_threads(put, names)


def of_kinds(
    kinds: list[str], errors: Doubles, strengths: list[float]
) -> tuple[NDArray[np.intp], list[str]]:
    """Return the number of each kind's best strength, by fold, and what errors (folds, strengths)
    are by kind, over those of the first strength.
    """
    best, lines = np.empty(len(kinds), np.intp), []
    for one in dict.fromkeys(kinds):
        of_kind = np.array([k == one for k in kinds])
        here = errors[of_kind]
        first, least = here[:, 0].sum(), here.min(axis=1).sum()
        best[of_kind] = here.sum(axis=0).argmin()
        counts = Counter(here.argmin(axis=1).tolist())
        each = ", ".join(
            f"{s:g}: {here[:, i].sum() / first:.3f} (best of {counts[i]})"
            for i, s in enumerate(strengths)
        )
        lines.append(f"{one}, {len(here)} folds: {each}; the best of each: {least / first:.3f}")
    return best, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--hessian", type=Path, required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 0.0, 0.25, 0.75])
    parser.add_argument("--only", type=float, nargs="*", help="single strengths that are scored")
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--encoder", default="search")
    parser.add_argument("--n-rows", type=int, default=128, help="of a matrix, to pick by")
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=256, help="tokens of a window")
    parser.add_argument("--folder", type=Path, help="for the rounded models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    weighed = load_imatrix(options.imatrix)
    how = Rounding(options.encoder, options.format, load_hessians(options.hessian))
    strengths = options.strengths
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        open_gguf(options.source) as source,
    ):
        moves = [_chosen(source, weighed, s, default_threads()) for s in strengths]
        errors = output_errors(source, how, [columns_of(m) for m in moves], options.n_rows)
        folds = [fold for fold, _ in moves[0]]
        of_folds = np.array([sum(errors[name] for name in fold.readers) for fold in folds])
        by_kind, lines = of_kinds([kind(source, fold) for fold in folds], of_folds, strengths)
        print("\n".join(lines))
        single = strengths if options.only is None else options.only
        choices = {f"{s:g}": moves[strengths.index(s)] for s in single}
        choices["picked"] = picked(moves, of_folds.argmin(axis=1))
        choices["picked by kind"] = picked(moves, by_kind)
        files = {name: Path(folder) / f"{name}.gguf" for name in choices}
        for name, chosen in choices.items():
            rounded(source, how, files[name], columns_of(chosen))
        found = print_klds(files, options.source, n_ctx=options.n_ctx, rounds=options.rounds)
    with options.out.open("a") as out:
        for name, row in found.items():
            result = {
                "model": options.source.stem,
                "format": options.format,
                "encoder": options.encoder,
                "strength": name,
                "n_tokens": how.hessians.n_tokens,
                "n_ctx": options.n_ctx,
                **row,
                **provenance(),
            }
            out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
