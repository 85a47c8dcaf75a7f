"""Quality at equal bytes: llama.cpp's mixes and best flags, uniform, random and our own plans.

    python bench/quality.py models/smol768-f16.gguf --sensitivity smol768-f16.sens.json

At the byte size of each of llama.cpp's mixes, every contender is made, scored through llama.cpp's
real kernels on the same tokens of WikiText-2 (64 × 512, none of which measured a sensitivity drawn
from the model itself), and added to a file of results; what is there already is not done again.
On 2 idle cores smol768 takes about an hour, and two more with `--n-seq-random 64`, which scores
the random plans on the same tokens as the others. `--table` prints the results.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import ramgguf
from contenders import N_CTX, Contender, Field
from provenance import provenance
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.statistics import FloatArray
from ramgguf.llama.system import system_info
from ramgguf.sensitivity.result import Sensitivity

MIXES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
AT_ONCE = 8  # models decoded beside one reference; each holds its logits, 100 MB
N_RESAMPLES = 4000


@dataclass(frozen=True)
class Row:
    """One contender's scores: per sequence the sums of NLL and KLD over n_scored tokens each."""

    model: str
    mix: str
    contender: str
    file: str
    encoder: str
    n_bytes: int
    n_seq: int
    n_scored: int
    nll: tuple[float, ...]
    kld: tuple[float, ...]
    kld_predicted: float | None
    engine: str
    cpu: str
    commit: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.model, self.mix, self.contender, self.n_seq

    @property
    def kld_mean(self) -> float:
        return math.fsum(self.kld) / (self.n_scored * self.n_seq)

    @property
    def per_token(self) -> FloatArray:
        """NLL and KLD per token of each sequence, float64[2, n_seq]."""
        return np.array([self.nll, self.kld]) / self.n_scored


def row(field: Field, mix: str, contender: Contender, result: EvalResult) -> Row:
    """Return the scores of one result."""
    origin = provenance()
    return Row(
        model=field.source.stem,
        mix=mix,
        contender=contender.name,
        file=result.model.label,
        encoder=field.measurement.encoder,
        n_bytes=result.model.n_bytes,
        n_seq=len(result.sequences),
        n_scored=result.sequences[0].n_scored,
        nll=tuple(round(s.nll_sum, 4) for s in result.sequences),
        kld=tuple(round(s.kld_sum or 0.0, 5) for s in result.sequences),
        kld_predicted=None if math.isnan(contender.predicted) else contender.predicted,
        engine=system_info().build,
        cpu=origin["cpu"],
        commit=origin["commit"],
    )


def score(field: Field, mix: str, contenders: Sequence[Contender]) -> Iterator[Row]:
    """Make the contenders' files, score them side by side and remove those that can be remade."""
    made = [c.make(field.folder / f"quality-{i}.gguf") for i, c in enumerate(contenders)]
    files = list(dict.fromkeys(made))
    scored = ramgguf.evaluate(
        files, field.source, n_ctx=N_CTX, n_seq=contenders[0].n_seq, threads=field.threads
    ).results
    for contender, path in zip(contenders, made, strict=True):
        found = row(field, mix, contender, scored[files.index(path)])
        print(
            f"{mix} {found.contender}: {found.n_bytes:,} bytes, KLD {found.kld_mean:.4f}",
            flush=True,
        )
        yield found
    for path in files:
        if path.name.startswith("quality-"):
            path.unlink()


def missing(
    field: Field, mix: str, budget: int, done: Iterable[Row], only: Sequence[str]
) -> Iterator[tuple[Contender, ...]]:
    """Yield what is not among the results yet, in groups that are scored side by side."""
    keys = {r.key for r in done}
    wanted = [
        c
        for c in field.contenders(mix, budget)
        if (not only or c.name.split()[0] in only)
        and (field.source.stem, mix, c.name, c.n_seq) not in keys
    ]
    for _, alike in itertools.groupby(wanted, key=lambda c: c.n_seq):
        group = tuple(alike)
        for start in range(0, len(group), AT_ONCE):
            yield group[start : start + AT_ONCE]


def read(path: Path) -> list[Row]:
    """Return the rows of a results file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [Row(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def interval(values: FloatArray) -> str:
    low, high = np.quantile(values, (0.025, 0.975))
    return f"[{low:.4g}, {high:.4g}]"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table per model and mix, random plans as one line.

    Intervals are 95 %, by bootstrap over sequences; ratios resample both models together.
    """
    for (model, mix), group in itertools.groupby(rows, key=lambda r: (r.model, r.mix)):
        of_mix = list(group)
        base = next((r for r in of_mix if r.contender == "mix"), None)
        if base is None:
            continue
        size = f"the bytes of {mix} ({base.n_bytes:,})"
        yield f"\n{model} at {size}, {base.n_seq} × {N_CTX} tokens:\n"
        yield "| | bytes | KLD | KLD / mix | corpus PPL | median PPL | predicted KLD |"
        yield "|---|---|---|---|---|---|---|"
        yield from (line(r, base) for r in of_mix if not r.contender.startswith("random"))
        drawn = [r for r in of_mix if r.contender.startswith("random")]
        if drawn:
            yield random_line(drawn, base)


def random_line(drawn: Sequence[Row], base: Row) -> str:
    """Return the table's line of all random plans: of each figure the median and the range."""
    kld = np.array([r.kld_mean for r in drawn])
    nll = np.stack([r.per_token[0] for r in drawn])
    same = drawn[0].n_seq == base.n_seq
    corpus, median = np.exp(nll.mean(1)), np.median(np.exp(nll), 1)
    n_seq_note = "" if same else f" ({drawn[0].n_seq} sequences)"
    ratio = spread(kld / base.kld_mean) if same else ""
    return (
        f"| {len(drawn)} random plans, median and range{n_seq_note} | | {spread(kld)} | "
        f"{ratio} | {spread(corpus)} | {spread(median)} | |"
    )


def spread(values: FloatArray) -> str:
    return f"{np.median(values):.4g} ({values.min():.4g} to {values.max():.4g})"


def line(r: Row, base: Row) -> str:
    """Return the table's line of a contender next to the mix."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, r.n_seq, (N_RESAMPLES, r.n_seq))
    (nll, kld), (_, kld_base) = r.per_token, base.per_token
    drawn = kld[draws].mean(1)
    predicted = "" if r.kld_predicted is None else f"{r.kld_predicted:.4f}"
    name = (
        r.contender if r.contender != "best flags" else f"best flags: {r.file.split('-f16-')[-1]}"
    )
    return (
        f"| {name} | {r.n_bytes:,} | {kld.mean():.4f} {interval(drawn)} | "
        f"{kld.mean() / kld_base.mean():.3f} {interval(drawn / kld_base[draws].mean(1))} | "
        f"{math.exp(nll.mean()):.2f} {interval(np.exp(nll[draws].mean(1)))} | "
        f"{np.median(np.exp(nll)):.2f} {interval(np.median(np.exp(nll[draws]), 1))} | {predicted} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--sensitivity", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path, help="of `ramgguf calibrate`: one contender more")
    parser.add_argument("--encoder", choices=("rtn", "search"), default="search")
    parser.add_argument("--models", type=Path, default=Path("models/llama"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.jsonl"))
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--only", default="", help="contenders by their first word: mix,ram")
    parser.add_argument("--n-seq", type=int, default=64)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--trials", type=int, default=32, help="swaps that refinement tries")
    parser.add_argument("--n-seq-random", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    rows = read(arguments.out)
    if not arguments.table:
        arguments.models.mkdir(parents=True, exist_ok=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sensitivity = Sensitivity.load(arguments.sensitivity)
        calibrated = None
        if arguments.imatrix:
            curves = ramgguf.measure(
                arguments.source, encoder=arguments.encoder, imatrix=arguments.imatrix
            )
            alphas = ramgguf.reweigh(sensitivity, arguments.source, arguments.imatrix)
            calibrated = curves, alphas
        field = Field(
            source=arguments.source,
            folder=arguments.models,
            measurement=ramgguf.measure(arguments.source, encoder=arguments.encoder),
            sensitivity=sensitivity,
            calibrated=calibrated,
            n_seq=arguments.n_seq,
            n_random=arguments.random,
            n_trials=arguments.trials,
            n_seq_random=arguments.n_seq_random,
            threads=arguments.threads,
        )
        only = [name for name in arguments.only.split(",") if name]
        for mix in arguments.mixes.split(","):
            budget = field.mix_file(mix).stat().st_size
            for group in missing(field, mix, budget, rows, only):
                for found in score(field, mix, group):
                    rows.append(found)
                    with arguments.out.open("a") as out:
                        out.write(json.dumps(asdict(found)) + "\n")
    rows.sort(key=lambda r: (r.model, MIXES.index(r.mix)))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
