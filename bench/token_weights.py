"""Which tokens count in a Hessian: all alike, none of the first, no large ones, or by attention.

    python bench/token_weights.py models/smol135d-f16.gguf --format Q4_0 --sequences 24

H = Σ w xxᵀ over the inputs x of a weight on tokens of the mix, with weights w by the rule:
`all` is 1; `after 8` is 0 for the first 8 tokens of a sequence; `first 10` is 10 for its first
token and 1 for others; `norm 1` is at most the median of
|x|² of the sequence over |x|²; `norm 4` four times that; `half` is 1 / |x|,
`unit` 1 / |x|², `over` 1 / |x|³. `attention 0.01` is the attention that the token receives in the
layer, summed over heads and queries, brought to 0.01 … 1 in each sequence and then to a mean of 1:
RSQ (Sung et al. 2025, arXiv 2503.01820), as in its authors' code. `seen 0.01` is the same of that
attention over the number of queries that see the token. With `--scales`, matrices are rounded with
columns scaled, and those of the rules in `--plain` without, too; with `--dampings`, each rule is
tried with each share of the diagonal's mean that is added to H. Every matrix of a layer is rounded
in the format by `--encoder`, decoded and put in the model's place; `search` weighs errors by the
diagonal of H alone. Prints the KLD on held-out windows of every domain, as a ratio to that of the
first rule and damping, and adds a row for each to bench/results/token_weights.jsonl.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from provenance import provenance
from ramgguf.core.parallel import default_threads
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants import formats
from ramgguf.quants.encoders import descent, gptq, points
from ramgguf.quants.hessian import DAMPING, Hessian, add_grams, mirror
from ramgguf.quants.scales import Scales, load_scales
from rounded import (
    Attention,
    Data,
    in_threads,
    layer_matrices,
    loaded,
    print_klds,
    put_rounded,
    rounded_copies,
    sequences,
)

Floats = NDArray[np.float32]
Encode = Callable[[str, Floats, Hessian, Floats], NDArray[np.uint8]]
Rule = Callable[[Floats, Floats], Floats]  # of |x|² and of the attention received
RESULTS = Path(__file__).parent / "results" / "token_weights.jsonl"


def _clipped(times: float) -> Rule:
    def weights(squares: Floats, _: Floats) -> Floats:
        most = times * np.median(squares)
        found: Floats = np.minimum(1, most / np.maximum(squares, np.finfo(np.float32).tiny))
        return found

    return weights


def _power(exponent: float) -> Rule:
    def weights(squares: Floats, _: Floats) -> Floats:
        tiny = np.finfo(np.float32).tiny
        found: Floats = np.power(np.maximum(squares, tiny), np.float32(-exponent))
        return found

    return weights


def _attention(least: float, *, per_query: bool = False) -> Rule:
    def weights(_: Floats, received: Floats) -> Floats:
        found = received / np.arange(len(received), 0, -1) if per_query else received
        found = least + (1 - least) * (found - found.min()) / (found.max() - found.min())
        of_mean_one: Floats = (found / found.mean()).astype(np.float32)
        return of_mean_one

    return weights


def _first(times: float) -> Rule:
    return lambda squares, _: np.where(np.arange(len(squares)) == 0, times, 1).astype(np.float32)


RULES: dict[str, Rule] = {
    "all": lambda squares, _: np.ones_like(squares),
    "after 8": lambda squares, _: (np.arange(len(squares)) >= 8).astype(np.float32),
    "norm 4": _clipped(4.0),
    "norm 1": _clipped(1.0),
    "half": _power(0.5),
    "unit": _power(1.0),
    "over": _power(1.5),
    "first 10": _first(10),
    "first 100": _first(100),
    "attention 0.003": _attention(0.003),
    "attention 0.01": _attention(0.01),
    "attention 0.03": _attention(0.03),
    "attention 0.1": _attention(0.1),
    "seen 0.01": _attention(0.01, per_query=True),
    "seen 0.1": _attention(0.1, per_query=True),
}


def grams(
    source: GGUFFile, names: list[str], n: int, rules: list[str]
) -> tuple[dict[str, str], dict[str, dict[str, Floats]]]:
    """Return the owner of each weight's input, and Σ w xxᵀ by rule and owner; Σ w is 1."""
    tap = Attention(names)
    sums: dict[str, dict[str, Floats]] = {rule: {} for rule in rules}
    total: dict[tuple[str, str], float] = {}
    with loaded(source.paths[0], tap) as model:
        for ids in sequences(source, n):
            model.clear()
            model.decode(ids)
            tap.check()
            tap.check_attention(source.n_trunk_layers or 0)
            for owner, x in tap.last.items():
                squares, layer = np.einsum("ij,ij->i", x, x), layer_of(owner)
                assert layer is not None
                for rule in rules:
                    w = RULES[rule](squares, tap.received[layer])
                    gram = sums[rule].setdefault(owner, np.zeros((x.shape[1],) * 2, np.float32))
                    add_grams([(x * np.sqrt(w)[:, None], gram)], default_threads())
                    total[rule, owner] = total.get((rule, owner), 0.0) + float(w.sum())
    for rule, by_owner in sums.items():
        for owner, gram in by_owner.items():
            mirror(gram)
            gram /= np.float32(total[rule, owner])
    return dict(tap.taken.owners), sums


ENCODERS: dict[str, Encode] = {
    "search": lambda format_, rows, _, weights: points.searched(format_, rows, weights),
    "gptq": gptq.encode,
    "descent": descent.encode,
}


@dataclass(frozen=True)
class Try:
    """How Hessians are weighed and damped, and whether columns are scaled."""

    rule: str
    damping: float
    scales: Scales | None

    @property
    def name(self) -> str:
        """What is printed, and the name of the file."""
        scaled = "" if self.scales is None else ", with scales"
        return f"{self.rule}, damped by {self.damping:g}{scaled}"


def rounded(
    source: GGUFFile,
    output: Path,
    format_: str,
    owners: dict[str, str],
    found: dict[str, Floats],
    how: Try,
    encode: Encode,
) -> None:
    """Write the model with its matrices rounded in the format under these Hessians, damped so.

    With scales, columns are rounded with these in them, and what comes out is divided again.
    """
    readers: dict[str, list[str]] = {}
    for name, owner in owners.items():
        if formats.suits(format_, source.tensor(name).row_length):
            readers.setdefault(owner, []).append(name)

    def round_inputs(owner: str, data: Data) -> None:
        columns = None if how.scales is None else how.scales.of_inputs(owner)
        hessian = Hessian.of(found[owner], 1, how.damping, columns)
        importance = np.ascontiguousarray(hessian.mean.diagonal())
        for name in readers[owner]:
            put_rounded(
                source, data, name, format_,
                lambda weights: encode(format_, weights, hessian, importance), columns,
            )  # fmt: skip

    with rounded_copies(source.paths[0], [output]) as (data,):
        in_threads(lambda owner: round_inputs(owner, data), readers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--format", default="Q4_0")
    parser.add_argument("--encoder", default="gptq", choices=ENCODERS)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--dampings", type=float, nargs="+", default=[DAMPING])
    parser.add_argument("--scales", type=Path, help="a file of transform: columns are scaled")
    parser.add_argument("--plain", nargs="*", choices=RULES, default=[], help="without them, too")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=256, help="tokens of a window")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.source.parent) as folder:
        with open_gguf(options.source) as source:
            matrices = layer_matrices(source)
            wanted = list(dict.fromkeys([*options.rules, *options.plain]))
            owners, sums = grams(source, matrices, options.sequences, wanted)
            scales = load_scales(options.scales) if options.scales else None
            tries = [
                Try(rule, damping, columns)
                for rules, columns in ((options.rules, scales), (options.plain, None))
                for rule in rules
                for damping in options.dampings
            ]
            files = {one.name: Path(folder) / f"{one.name}.gguf" for one in tries}
            for one in tries:
                rounded(
                    source, files[one.name], options.format, owners, sums[one.rule], one,
                    ENCODERS[options.encoder],
                )  # fmt: skip
        found = print_klds(files, options.source, n_ctx=options.n_ctx, rounds=options.rounds)
    with options.out.open("a") as out:
        for one in tries:
            row = {
                "model": options.source.stem,
                "format": options.format,
                "encoder": options.encoder,
                "rule": one.rule,
                "damping": one.damping,
                "with_scales": one.scales is not None,
                "n_sequences": options.sequences,
                "n_ctx": options.n_ctx,
                **found[one.name],
                **provenance(),
            }
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
