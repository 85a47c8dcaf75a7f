"""Whether plans by the errors of error feedback win once these are read on other tokens.

    python bench/held_out_curves.py models/smol768-f16.gguf --imatrix I.gguf --hessian H.gguf \
        --sensitivity model.sens.json --budgets 122331808

`quantize --encoder gptq` plans by the errors of search, for GPTQ's own, on the tokens that it
minimises them on, promise too much. Curves here, of some rows of every matrix:

`search`: errors of search, weighed by the importance matrix, as `quantize` has them;
`searched output`: errors of search in the output, Σ eHeᵀ / Σ wHwᵀ, H of other tokens;
`own`: errors of GPTQ by the Hessians in the file, H the same;
`held out`: errors of GPTQ by these, H of other tokens.

H of other tokens is from sequences of the mix after those of the file (`--first` of each source).
Each curve of a tensor is multiplied, so that search's error in the format in which α was read is
that of the reading: α is nats per unit of that. Plans by each are rounded by GPTQ with the file's
Hessians and scored on held-out windows: KLD as a ratio to that of the first. Adds a row for each
plan to bench/results/held_out_curves.jsonl.
"""

import argparse
import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

import ramgguf
from contenders import plan_by_alpha
from provenance import provenance
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent
from ramgguf.gguf.architecture import HEAD, TOKEN_EMBEDDING
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure import Measurement, measure_file
from ramgguf.quants.encoders import gptq
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.encoders.points import searched
from ramgguf.quants.hessian import Hessians, add_grams, load_hessians, mirror
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.quants.output_metadata import overhead_bytes
from ramgguf.sensitivity.result import Sensitivity, TensorSensitivity
from rounded import (
    Floats,
    Inputs,
    in_threads,
    layer_matrices,
    loaded,
    print_klds,
    sequences,
)

RESULTS = Path(__file__).parent / "results" / "held_out_curves.jsonl"
CURVES = ("search", "searched output", "own", "held out")
SCORED = [
    "search",
    "own",
    "held out",
]  # plans by output errors of search are nearly those of search
Curves = dict[str, dict[str, float]]  # by their name and format, errors


def other_grams(source: GGUFFile, n: int, first: int) -> dict[str, Floats]:
    """Return XᵀX of every matrix on n sequences of the mix, from number `first` of each source."""
    names = layer_matrices(source)
    head = TOKEN_EMBEDDING if source.has_tied_embedding else HEAD
    tap, grams = Inputs([*names, head]), dict[str, Floats]()
    with loaded(source.paths[0], tap) as model:
        for ids in sequences(source, n, first):
            model.clear()
            model.decode(ids)
            tap.check()
            for owner, x in tap.last.items():
                gram = grams.setdefault(owner, np.zeros((x.shape[1],) * 2, np.float32))
                add_grams([(x, gram)], default_threads())
    for gram in grams.values():
        mirror(gram)
    return {name: grams[owner] for name, owner in tap.taken.owners.items()}


def curves(
    source: GGUFFile,
    t: TensorSensitivity,
    names: list[str],
    theirs: Hessians,
    other: Floats,
    n: int,
) -> Curves:
    """Return the errors of a matrix in the formats, by curve, from n of its rows.

    Where α was not read on it, it is per unit of search's error in Q4_K on these rows.
    """
    tensor = source.tensor(t.name)
    data = source.read_rows(tensor, 0, tensor.n_rows)
    if tensor.n_rows > n:
        data = data[np.sort(np.random.default_rng(0).choice(tensor.n_rows, n, replace=False))]
    weights = decode_rows(tensor.type_name, data, tensor.row_length)
    hessian = theirs.factored(tensor.name, tensor.row_length)
    importance = np.ascontiguousarray(hessian.mean.diagonal())

    def errors(format_: str) -> dict[str, float]:
        of_search = searched(format_, weights, importance)
        of_gptq = gptq.encode(format_, weights, hessian, importance)
        by_search = weights - decode_rows(format_, of_search, tensor.row_length)
        by_gptq = weights - decode_rows(format_, of_gptq, tensor.row_length)
        return {
            "search": float(np.square(by_search).sum(axis=0) @ importance),
            "searched output": _squares(by_search, other),
            "own": _squares(by_gptq, hessian.mean),
            "held out": _squares(by_gptq, other),
            "searched here": _squares(by_search, hessian.mean),
        }

    read_in = "Q4_K" if t.reading is None else t.reading.format
    each = {format_: errors(format_) for format_ in {*names, read_in}}
    read = each[read_in]
    if t.reading is None:
        nmse = read["search"] / float(np.square(weights).sum(axis=0) @ importance)
    else:
        nmse = t.reading.nmse
    unit = {"own": "searched here", "held out": "searched output"}  # what α is per unit of
    return {
        curve: {f: nmse * each[f][curve] / read[unit.get(curve, curve)] for f in names}
        for curve in CURVES
    }


def _squares(rows: Floats, gram: Floats) -> float:
    """Return Σ eHeᵀ over the rows e."""
    return float(np.einsum("ij,ij->", rows @ gram, rows, dtype=np.float64))


def by(measured: Measurement, found: dict[str, Curves], curve: str) -> Measurement:
    """Return the measurement with the errors of a curve."""
    tensors = []
    for tensor in measured.tensors:
        errors = found[tensor.name][curve] if tensor.name in found else {}
        points = tuple(replace(p, nmse=errors.get(p.format, p.nmse)) for p in tensor.points)
        tensors.append(tensor.model_copy(update={"points": points}))
    return measured.model_copy(update={"tensors": tuple(tensors)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--hessian", type=Path, required=True)
    parser.add_argument("--sensitivity", type=Path, required=True, help="α with this matrix")
    parser.add_argument("--formats", nargs="+", default=["Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
    parser.add_argument("--budgets", type=int, nargs="+", required=True, help="in bytes")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=SCORED)
    parser.add_argument("--n-rows", type=int, default=256, help="of a matrix, for its curves")
    parser.add_argument("--sequences", type=int, default=15, help="of other tokens")
    parser.add_argument("--first", type=int, default=13, help="their first number")
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=256, help="tokens of a window")
    parser.add_argument("--folder", type=Path, help="for the files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    weighed, theirs = load_imatrix(options.imatrix), load_hessians(options.hessian)
    by_gptq = {"encoder": "gptq", "imatrix": load_imatrix(options.imatrix, options.hessian).source}
    sensitivity = Sensitivity.load(options.sensitivity)
    with open_gguf(options.source) as source:
        measured = measure_file(
            source, n_overhead_bytes=overhead_bytes(source, weighed.source),
            wanted=options.formats, encoder="search", imatrix=weighed, sampled=True,
            threads=default_threads(), progress=Silent(),
        )  # fmt: skip
        others = other_grams(source, options.sequences, options.first)
        alphas = {t.name: t for t in sensitivity.tensors}
        names = {
            t.name: [p.format for p in t.points if p.format in options.formats]
            for t in measured.tensors
            if t.kept is None and t.name in others
        }
        each = in_threads(
            lambda n: curves(source, alphas[n], names[n], theirs, others[n], options.n_rows),
            names,
        )
    print(f"curves of {len(names)} of {sum(t.kept is None for t in measured.tensors)} tensors")
    found = dict(zip(names, each, strict=True))
    for curve in CURVES[1:]:
        less = [c[curve][f] / c["search"][f] for c in each for f in c["search"]]
        print(f"{curve}: of the errors of search", np.quantile(less, (0.05, 0.5, 0.95)).round(3))
    for budget in options.budgets:
        plans = {
            curve: plan_by_alpha(by(measured, found, curve), budget, sensitivity)
            for curve in options.curves
        }
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            files = {curve: Path(folder) / f"{curve}.gguf" for curve in plans}
            for curve, plan in plans.items():
                ramgguf.quantize(
                    options.source, from_plan=plan.model_copy(update=by_gptq),
                    output=files[curve], verify=False, threads=default_threads(),
                )  # fmt: skip
            print(f"{budget:,} bytes")
            rows = print_klds(files, options.source, n_ctx=options.n_ctx, rounds=options.rounds)
            sizes = {curve: path.stat().st_size for curve, path in files.items()}
        with options.out.open("a") as out:
            for curve, row in rows.items():
                result = {
                    "model": options.source.stem,
                    "budget": budget,
                    "curve": curve,
                    "n_bytes": sizes[curve],
                    "predicted_kld": plans[curve].total_cost,
                    "formats": Counter(a.format for a in plans[curve].assignments),
                    "n_tokens": theirs.n_tokens,
                    "n_other_tokens": 512 * options.sequences,
                    "n_ctx": options.n_ctx,
                    **row,
                    **provenance(),
                }
                out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
