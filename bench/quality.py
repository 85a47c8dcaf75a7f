"""Quality at equal bytes: llama.cpp's mixes and best flags, uniform, random and our own plans.

    python bench/quality.py models/smol768-f16.gguf --sensitivity smol768-f16.sens.json

At the byte size of each of llama.cpp's mixes, every contender is made, scored through llama.cpp's
real kernels on the same tokens of WikiText-2 (64 × 512, none of which measured a sensitivity drawn
from the model itself), and added to a file of results; what is there already is not done again.
On 2 idle cores smol768 takes about an hour. `--table` prints the results.
"""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import ramgguf
from best_flags import near
from llama_quantize import quantize
from ramgguf.engine.system import system_info
from ramgguf.results import EvalResult
from ramgguf.schema import Measurement, Plan
from ramgguf.sensitivities import Sensitivity

MIXES = ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
UNIFORM = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
N_CTX = 512


@dataclass(frozen=True)
class Row:
    """One contender's scores; kld_error is the standard error over sequences."""

    model: str
    mix: str
    contender: str
    n_bytes: int
    n_seq: int
    kld_mean: float
    kld_error: float
    ppl: float
    ppl_median: float
    kld_predicted: float | None
    cpu: str
    engine: str


@dataclass(frozen=True)
class Contender:
    """A file to be made and scored; predicted is the KLD that its plan was expected to have."""

    name: str
    n_seq: int
    make: Callable[[Path], Path]
    predicted: float | None = None
    keep: bool = False


@dataclass(frozen=True)
class Bench:
    """What all contenders share."""

    source: Path
    folder: Path
    measurement: Measurement
    sensitivity: Sensitivity
    n_seq: int
    n_random: int
    n_seq_random: int

    def mix_file(self, mix: str) -> Path:
        return quantize(self.source, self.folder / f"{self.source.stem}-{mix}.gguf", mix)

    def contenders(self, mix: str) -> Iterator[Contender]:
        """Yield all contenders of at most the mix's bytes."""
        n_bytes = self.mix_file(mix).stat().st_size
        yield Contender("mix", self.n_seq, lambda _: self.mix_file(mix), keep=True)
        yield Contender("best flags", self.n_seq, lambda _: self._best_flags(n_bytes), keep=True)
        uniform = self._uniform(n_bytes)
        yield self._planned(f"uniform {uniform[0]}", uniform[1])
        for objective in ("ram", "nmse", "weighted"):
            plan = ramgguf.plan(self.measurement, n_bytes, objective=objective, min_sqnr_db=0)
            yield self._planned(objective, plan)
        plan = ramgguf.plan(self.measurement, n_bytes, sensitivity=self.sensitivity, min_sqnr_db=0)
        yield self._planned("sensitivity", plan)
        for seed in range(self.n_random):
            yield self._planned(f"random {seed}", self._random(n_bytes, seed), self.n_seq_random)

    def _planned(self, name: str, plan: Plan, n_seq: int | None = None) -> Contender:
        alpha = {t.name: t.alpha for t in self.sensitivity.tensors}
        predicted = math.fsum(alpha.get(a.name, 0.0) * a.nmse for a in plan.assignments)

        def make(output: Path) -> Path:
            ramgguf.quantize(self.source, from_plan=plan, output=output, force=True, verify=False)
            return output

        return Contender(name, n_seq or self.n_seq, make, predicted)

    def _uniform(self, n_bytes: int) -> tuple[str, Plan]:
        """Return the largest format that all tensors can have within the bytes."""
        found = None
        for name in UNIFORM:
            plan = ramgguf.plan(self.measurement, "1000%", pins=[f".={name}"])
            if plan.n_bytes <= n_bytes:
                found = name, plan
        if found is None:
            raise SystemExit(f"no uniform plan has {n_bytes} bytes or fewer")
        return found

    def _random(self, n_bytes: int, seed: int) -> Plan:
        """Return the plan of sensitivities drawn at random: of full size, and otherwise blind."""
        rng = np.random.default_rng(seed)
        drawn = tuple(
            t.model_copy(update={"alpha": t.n_weights * math.exp(rng.normal(0, 1.5))})
            for t in self.sensitivity.tensors
        )
        blind = self.sensitivity.model_copy(update={"tensors": drawn})
        return ramgguf.plan(self.measurement, n_bytes, sensitivity=blind, min_sqnr_db=0)

    def _best_flags(self, n_bytes: int) -> Path:
        """Return the best by KLD of all files of at most the bytes that llama.cpp's flags make."""
        files = []
        for file_type, embedding, _ in near(self.source, n_bytes):
            name = f"{self.source.stem}-{file_type}-{embedding or 'default'}.gguf"
            path = quantize(self.source, self.folder / name, file_type, token_embedding=embedding)
            if path.stat().st_size <= n_bytes:
                files.append(path)
        # Chosen on other sequences than those of the table: no luck in the draw.
        scored = ramgguf.evaluate(files, self.source, n_ctx=N_CTX, n_seq=8, seed=1).results
        best = min(scored, key=lambda r: r.kld_mean)
        return self.folder / Path(best.model.path).name


def row(bench: Bench, mix: str, contender: Contender, result: EvalResult) -> Row:
    """Return the scores of one result."""
    kld = np.array([s.kld_sum for s in result.sequences], np.float64)
    n_scored = np.array([s.n_scored for s in result.sequences])
    nll = np.array([s.nll_sum for s in result.sequences])
    per_token = kld / n_scored
    return Row(
        model=bench.source.stem,
        mix=mix,
        contender=contender.name,
        n_bytes=result.model.n_bytes,
        n_seq=contender.n_seq,
        kld_mean=float(kld.sum() / n_scored.sum()),
        kld_error=float(per_token.std(ddof=1) / math.sqrt(len(per_token))),
        ppl=float(math.exp(nll.sum() / n_scored.sum())),
        ppl_median=float(np.median(np.exp(nll / n_scored))),
        kld_predicted=contender.predicted,
        cpu=platform.processor() or platform.machine(),
        engine=system_info().build,
    )


def read(path: Path) -> list[Row]:
    """Return the rows of a results file; a last line that was cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [Row(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def print_table(rows: list[Row]) -> None:
    """Print every size's contenders, random plans as one line, and KLD as a ratio to the mix."""
    for mix in dict.fromkeys(r.mix for r in rows):
        of_mix = [r for r in rows if r.mix == mix]
        base = next((r.kld_mean for r in of_mix if r.contender == "mix"), math.nan)
        print(f"\n{mix}: | bytes | KLD ± error | ratio | PPL | median | predicted KLD")
        for r in of_mix:
            if not r.contender.startswith("random"):
                told = "" if r.kld_predicted is None else f"{r.kld_predicted:.4f}"
                print(
                    f"{r.contender:14} | {r.n_bytes:,} | {r.kld_mean:.4f} ± {r.kld_error:.4f} | "
                    f"{r.kld_mean / base:.2f} | {r.ppl:.3f} | {r.ppl_median:.3f} | {told}"
                )
        drawn = np.array([r.kld_mean for r in of_mix if r.contender.startswith("random")])
        if len(drawn):
            print(
                f"{len(drawn)} random plans: KLD {np.median(drawn):.4f} "
                f"({drawn.min():.4f} to {drawn.max():.4f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--sensitivity", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("models/llama"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality.jsonl"))
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--only", help="contenders by their first word, as in mix,sensitivity")
    parser.add_argument("--n-seq", type=int, default=64)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--n-seq-random", type=int, default=8)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    rows = read(arguments.out)
    if not arguments.table:
        arguments.models.mkdir(parents=True, exist_ok=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sensitivity = Sensitivity.load(arguments.sensitivity)
        bench = Bench(
            source=arguments.source,
            folder=arguments.models,
            measurement=ramgguf.measure(arguments.source, encoder=sensitivity.encoder),
            sensitivity=sensitivity,
            n_seq=arguments.n_seq,
            n_random=arguments.random,
            n_seq_random=arguments.n_seq_random,
        )
        only = arguments.only.split(",") if arguments.only else None
        for mix in arguments.mixes.split(","):
            for contender in bench.contenders(mix):
                if only and contender.name.split()[0] not in only:
                    continue
                key = (bench.source.stem, mix, contender.name, contender.n_seq)
                if key not in {(r.model, r.mix, r.contender, r.n_seq) for r in rows}:
                    rows.append(score(bench, mix, contender))
                    with arguments.out.open("a") as out:
                        out.write(json.dumps(asdict(rows[-1])) + "\n")
    print_table(rows)


def score(bench: Bench, mix: str, contender: Contender) -> Row:
    """Make the contender's file, score it and remove it unless it is llama.cpp's."""
    path = contender.make(bench.folder / "contender.gguf")
    scored = ramgguf.evaluate([path], bench.source, n_ctx=N_CTX, n_seq=contender.n_seq).results
    result = next(r for r in scored if Path(r.model.path).name == path.name)
    if not contender.keep:
        path.unlink()
    found = row(bench, mix, contender, result)
    print(f"{mix} {found.contender}: {found.n_bytes:,} bytes, KLD {found.kld_mean:.4f}", flush=True)
    return found


if __name__ == "__main__":
    main()
