"""Encoders at uniform formats: weight error beside KLD and PPL, and where the two disagree.

    python bench/encoders.py models/smol768-f16.gguf --imatrix I.gguf --hessian H.gguf --text T.txt

rtn; search; clip (rtn's scale, shrunk for the least squared error); hqq (half-quadratic splitting,
Badri & Shaji 2023: scale fixed, offset fitted under an l_p norm, p = 0.7); search with importance;
gptq. clip and hqq choose scales by their own rule and are written as blocks like the others.
Marks every pair of encoders where the error falls and the model gets worse. Appends a line per file
to bench/results/encoders_end_to_end.jsonl.
"""

import argparse
import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import ramgguf
from alternatives import write_alternative
from provenance import provenance
from ramgguf.results import EvalResult
from ramgguf.schema import Encoder
from scores import kld_ratio, scores

FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
OURS: dict[str, tuple[Encoder, bool]] = {
    "rtn": ("rtn", False),
    "search": ("search", False),
    "search imatrix": ("search", True),
    "gptq": ("gptq", True),
}
OTHERS = ("clip", "hqq")


@dataclass(frozen=True)
class Made:
    """A file, its format and encoder, and its plain NMSE over all quantized weights."""

    encoder: str
    format: str
    path: Path
    nmse: float


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        made = [
            make(arguments, encoder, name, Path(folder))
            for name in arguments.formats
            for encoder in arguments.encoders
        ]
        found = ramgguf.evaluate(
            [m.path for m in made], arguments.source, text=arguments.text, n_ctx=512,
            n_seq=arguments.n_seq, threads=arguments.threads,
        ).results  # fmt: skip
    report(arguments, made, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--hessian", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--encoders", nargs="*", default=[*OURS, *OTHERS])
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/encoders_end_to_end.jsonl"))
    return parser.parse_args()


def make(arguments: argparse.Namespace, encoder: str, name: str, folder: Path) -> Made:
    """Write the model with every quantizable matrix in the format; return what it is."""
    path = folder / f"{encoder.replace(' ', '-')}-{name}.gguf"
    ours, weighed = OURS.get(encoder, ("rtn", False))
    measured = ramgguf.measure(
        arguments.source, formats=[name], encoder=ours, threads=arguments.threads,
        imatrix=arguments.imatrix if weighed else None,
        hessian=arguments.hessian if ours == "gptq" else None,
    )  # fmt: skip
    plan = ramgguf.plan(measured, "1000%", pins=[f".={name}"], min_sqnr_db=0)
    ramgguf.quantize(
        arguments.source, from_plan=plan, output=path, verify=False, threads=arguments.threads
    )
    if encoder in OTHERS:
        write_alternative(path, arguments.source, encoder)
    return Made(encoder, name, path, weight_error(arguments.source, path))


def weight_error(source: Path, path: Path) -> float:
    """Return Σ(x−q)² / Σx² over the weights that are quantized."""
    from ramgguf import _core
    from ramgguf.gguf_io import open_gguf

    error = squares = 0.0
    with open_gguf(source) as before, open_gguf(path) as after:
        for tensor in before.tensors:
            other = after.tensor(tensor.name)
            if other.type_name != tensor.type_name:
                rows = before.read_rows(tensor, 0, tensor.n_rows)
                blocks = after.read_rows(other, 0, other.n_rows)
                stats = _core.compare(tensor.type_name, rows, other.type_name, blocks)
                error += stats.errors[0].sum_squared_error
                squares += stats.sum_squares
    return error / squares


def report(arguments: argparse.Namespace, made: list[Made], found: tuple[EvalResult, ...]) -> None:
    """Print a table with the disagreeing pairs under it, and append the rows."""
    rows = list(zip(made, found, strict=True))
    with arguments.out.open("a") as out:
        for m, result in rows:
            row = {
                "encoder": m.encoder,
                "format": m.format,
                "nmse": m.nmse,
                **asdict(scores(result)),
                "n_bytes": result.model.n_bytes,
                "n_seq": arguments.n_seq,
                **provenance(),
            }
            out.write(json.dumps(row) + "\n")
            print(f"| {m.format} | {m.encoder} | {m.nmse:.3e} | {row['kld']:.4f} |")
    for (a, x), (b, y) in itertools.permutations(rows, 2):
        if a.format == b.format and a.nmse < b.nmse:
            ratio = kld_ratio(x, y)
            if ratio.low > 1:
                print(
                    f"{a.format}: {a.encoder} has {a.nmse / b.nmse:.2f} of {b.encoder}'s error and "
                    f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f}) of its KLD"
                )


if __name__ == "__main__":
    main()
