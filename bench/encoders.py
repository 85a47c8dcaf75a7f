"""Encoders beside each other: weight error beside KLD and PPL, and where the two disagree.

    python bench/encoders.py models/smol768-f16.gguf --imatrix I.gguf --hessian H.gguf

rtn; search; clip (rtn's scale, shrunk for the least squared error); hqq (half-quadratic splitting,
Badri & Shaji 2023: scale fixed, offset fitted under an l_p norm, p = 0.7, where a format has an
offset: Q2_K, Q4_K, Q5_K); search with importance; gptq; descent. All are written as ordinary
blocks.
Groups are uniform formats (Q4_K), and with --budgets plans of equal bytes from those: all
encoders in the very formats that rtn's curves and the priors choose (`105388192`), and, with --own,
ours in plans by their own curves (`105388192 own`). Marks every pair of a group where the error
falls and the model gets worse. Appends a line per file to bench/results/encoders_end_to_end.jsonl;
what is there is not done again.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ramgguf
from alternatives import write_alternative
from half_quadratic import LAYOUTS
from provenance import provenance
from ramgguf import _core
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from ramgguf.quants.encoders import ENCODERS, EncoderName
from ramgguf.quants.encoders.decoding import readable
from ramgguf.quants.imatrix import load_imatrix
from scores import kld_ratio, scores

FORMATS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
OURS: dict[str, tuple[EncoderName, bool]] = {
    "rtn": ("rtn", False),
    "search": ("search", False),
    "search imatrix": ("search", True),
    "gptq": ("gptq", True),
    "descent": ("descent", True),
}
OTHERS = ("clip", "hqq")


@dataclass(frozen=True)
class Made:
    """A file, the group that it is compared in, its encoder, its plain NMSE over all weights."""

    group: str
    encoder: str
    path: Path
    nmse: float


class Maker:
    """Makes the files of the groups, measuring every encoder at most once."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder = arguments, folder
        self._curves: dict[str, Measurement] = {}

    def groups(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the groups and their encoders."""
        encoders = list(self._arguments.encoders)
        for name in self._arguments.formats:
            yield name, [e for e in encoders if e != "hqq" or name in LAYOUTS]
        for budget in self._arguments.budgets:
            yield str(budget), encoders
            if self._arguments.own:
                yield f"{budget} own", [e for e in encoders if e in OURS]

    def make(self, group: str, encoder: str) -> Made:
        """Write the file of an encoder in a group."""
        path = self._folder / f"{encoder}-{group}.gguf".replace(" ", "-")
        arguments = self._arguments
        ramgguf.quantize(
            arguments.source,
            from_plan=self._plan(group, encoder),
            output=path,
            verify=False,
            force=True,
            threads=arguments.threads,
        )
        if encoder in OTHERS:
            write_alternative(path, arguments.source, encoder)
        return Made(group, encoder, path, weight_error(arguments.source, path))

    def _plan(self, group: str, encoder: str) -> Plan:
        if group.endswith("own"):
            budget = int(group.split()[0])
            return ramgguf.plan(self._measured(encoder), budget, min_sqnr_db=0)
        # What is written depends on formats and encoder only; errors are those of the files.
        ours, weighed = OURS.get(encoder, ("rtn", False))
        source = None
        if weighed:
            hessian = self._arguments.hessian if ENCODERS[ours].plans_by else None
            source = load_imatrix(self._arguments.imatrix, hessian).source
        return self._common(group).model_copy(update={"encoder": ours, "imatrix": source})

    def _common(self, group: str) -> Plan:
        """Return the formats that all encoders of the group share."""
        if not group.isdigit():
            pins = [f".={group}"]
            return ramgguf.plan(self._measured("rtn"), "1000%", pins=pins, min_sqnr_db=0)
        return ramgguf.plan(self._measured("rtn"), int(group), min_sqnr_db=0)

    def _measured(self, encoder: str) -> Measurement:
        if encoder not in self._curves:
            ours, weighed = OURS[encoder]
            self._curves[encoder] = ramgguf.measure(
                self._arguments.source,
                formats=self._arguments.plan_formats,
                encoder=ours,
                imatrix=self._arguments.imatrix if weighed else None,
                hessian=self._arguments.hessian if ENCODERS[ours].plans_by else None,
                threads=self._arguments.threads,
            )
        return self._curves[encoder]


def weight_error(source: Path, path: Path) -> float:
    """Return Σ(x−q)² / Σx² over the weights that are quantized."""
    error = squares = 0.0
    with open_gguf(source) as before, open_gguf(path) as after:
        for tensor in before.tensors:
            other = after.tensor(tensor.name)
            if other.type_name != tensor.type_name:
                rows = before.read_rows(tensor, 0, tensor.n_rows)
                blocks = after.read_rows(other, 0, other.n_rows)
                stats = _core.compare(tensor.type_name, rows, *readable(other.type_name, blocks))
                error += stats.errors[0].sum_squared_error
                squares += stats.sum_squares
    return error / squares


def score(arguments: argparse.Namespace, made: list[Made]) -> None:
    """Score a group's files side by side, append their rows, print the pairs that disagree."""
    found = ramgguf.evaluate(
        [m.path for m in made],
        arguments.source,
        n_ctx=512,
        n_seq=arguments.n_seq,
        threads=arguments.threads,
    ).results
    rows = list(zip(made, found, strict=True))
    with arguments.out.open("a") as out:
        for m, result in rows:
            row = {
                "model": arguments.source.stem,
                "group": m.group,
                "encoder": m.encoder,
                "nmse": m.nmse,
                **asdict(scores(result)),
                "n_bytes": result.model.n_bytes,
                "n_seq": len(result.sequences),
                "worse_than": disagreements(m, result, rows),
                **provenance(),
            }
            out.write(json.dumps(row) + "\n")
            print(
                f"{m.group} | {m.encoder} | NMSE {m.nmse:.3e} | KLD {row['kld']:.4f} | "
                f"PPL {row['corpus_ppl']:.2f}, median {row['median_ppl']:.2f} | "
                f"worse than {row['worse_than']}",
                flush=True,
            )


def disagreements(
    made: Made, result: EvalResult, rows: list[tuple[Made, EvalResult]]
) -> dict[str, tuple[float, float, float]]:
    """Return those of more error and significantly less KLD: the KLDs' ratio and its interval."""
    ratios = {
        other.encoder: kld_ratio(result, theirs) for other, theirs in rows if made.nmse < other.nmse
    }
    return {name: (r.value, r.low, r.high) for name, r in ratios.items() if r.low > 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--hessian", type=Path, required=True)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--plan-formats", nargs="*", default=list(FORMATS), help="of plans")
    parser.add_argument("--budgets", nargs="*", type=int, default=[], help="in bytes")
    parser.add_argument("--own", action="store_true", help="also plans by own curves")
    parser.add_argument("--encoders", nargs="*", default=[*OURS, *OTHERS])
    parser.add_argument("--n-seq", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results/encoders_end_to_end.jsonl"))
    arguments = parser.parse_args()
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {(r["model"], r["group"], r["encoder"]) for r in map(json.loads, lines)}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        maker = Maker(arguments, Path(folder))
        for group, encoders in maker.groups():
            if all((arguments.source.stem, group, e) in done for e in encoders):
                continue
            made = [maker.make(group, encoder) for encoder in encoders]
            score(arguments, made)
            for m in made:
                m.path.unlink()


if __name__ == "__main__":
    main()
