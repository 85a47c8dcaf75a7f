"""The contenders of bench/quality.py: files of at most a mix's bytes, and how each is made."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

import ramgguf
from baselines import Flags, all_flags, near
from llama_quantize import quantize
from ramgguf.core.errors import PlanError
from ramgguf.measure.result import Measurement, TensorMeasurement
from ramgguf.plan.objectives import SENSITIVITY
from ramgguf.plan.result import Plan
from ramgguf.sensitivity.result import Sensitivity

UNIFORM = ("Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0")
N_FLAGS = 5  # of them are made and scored, the best by predicted KLD
N_CTX = 512


@dataclass(frozen=True)
class Contender:
    """A file to be made and scored; predicted is the KLD that its plan was expected to have.

    Files with a path of their own stay there: llama.cpp's, which take minutes to make.
    """

    name: str
    n_seq: int
    make: Callable[[Path], Path]
    predicted: float


@dataclass(frozen=True)
class Field:
    """What all contenders of a model share."""

    source: Path
    folder: Path
    measurement: Measurement
    sensitivity: Sensitivity
    calibrated: tuple[Measurement, Sensitivity] | None
    n_seq: int
    n_random: int
    n_trials: int
    n_seq_random: int
    threads: int

    def mix_file(self, mix: str) -> Path:
        """Return llama.cpp's file of the mix."""
        return self._llama(mix, None)

    def contenders(self, mix: str, budget: int) -> Iterator[Contender]:
        """Yield all contenders of at most the budget, which is the mix's bytes."""
        files = {f.label: f for f in self._flags()}
        of_mix = files[f"{mix}-default"]
        yield self._of_flags("mix", of_mix)
        yield Contender("best flags", self.n_seq, lambda _: self._best_flags(mix), math.nan)
        uniform = self._uniform(budget)
        if uniform is not None:
            yield self._planned(*uniform)
        for objective in ("ram", "weighted"):
            plan = ramgguf.plan(self.measurement, budget, objective=objective, min_sqnr_db=0)
            yield self._planned(objective, plan)
        plan = plan_by_alpha(self.measurement, budget, self.sensitivity)
        yield self._planned("sensitivity", plan)
        yield self._refined(plan)
        if self.calibrated is not None:
            curves, alphas = self.calibrated
            plan = plan_by_alpha(curves, budget, alphas)
            yield self._planned("calibrated", plan, known=self.calibrated)
        for seed in range(self.n_random):
            yield self._planned(f"random {seed}", self._random(budget, seed), self.n_seq_random)

    def _planned(
        self,
        name: str,
        plan: Plan,
        n_seq: int | None = None,
        known: tuple[Measurement, Sensitivity] | None = None,
    ) -> Contender:
        def make(output: Path) -> Path:
            ramgguf.quantize(
                self.source,
                from_plan=plan,
                output=output,
                force=True,
                verify=False,
                threads=self.threads,
            )
            return output

        formats = {a.name: a.format for a in plan.assignments}
        predicted = predicted_kld(formats, *(known or (self.measurement, self.sensitivity)))
        return Contender(name, n_seq or self.n_seq, make, predicted)

    def _refined(self, plan: Plan) -> Contender:
        """Return the plan after trials of swaps, which are made when the file is."""

        def make(output: Path) -> Path:
            refined = ramgguf.refine(
                self.source,
                plan,
                self.measurement,
                n_trials=self.n_trials,
                sensitivity=self.sensitivity,
                threads=self.threads,
                folder=self.folder,
            )
            if (found := refined.refinement) is not None:
                print(f"{found.n_tried} swaps tried, {len(found.swaps)} taken", flush=True)
            return self._planned("refined", refined).make(output)

        return Contender(f"refined {self.n_trials}", self.n_seq, make, math.nan)

    def _of_flags(self, name: str, flags: Flags) -> Contender:
        return Contender(
            name,
            self.n_seq,
            lambda _: self._llama(flags.file_type, flags.embedding),
            predicted_kld(flags.types, self.measurement, self.sensitivity),
        )

    def _uniform(self, budget: int) -> tuple[str, Plan] | None:
        """Return the largest format that all tensors can have within the bytes, if there is one."""
        found = None
        for name in UNIFORM:
            try:
                plan = ramgguf.plan(self.measurement, "1000%", pins=[f".={name}"])
            except PlanError:  # of rows that are no whole blocks
                continue
            if plan.n_bytes <= budget:
                found = f"uniform {name}", plan
        return found

    def _random(self, budget: int, seed: int) -> Plan:
        """Return the plan of sensitivities drawn at random: of full size, and otherwise blind."""
        rng = np.random.default_rng(seed)
        drawn = tuple(
            t.model_copy(update={"alpha": t.n_weights * math.exp(rng.normal(0, 1.5))})
            for t in self.sensitivity.tensors
        )
        blind = self.sensitivity.model_copy(update={"tensors": drawn})
        return plan_by_alpha(self.measurement, budget, blind)

    def _llama(self, file_type: str, embedding: str | None) -> Path:
        name = f"{self.source.stem}-{file_type}-{embedding or 'default'}"
        return quantize(
            self.source,
            self.folder / f"{name}.gguf",
            file_type,
            token_embedding=embedding,
            threads=self.threads,
        )

    def _flags(self) -> tuple[Flags, ...]:
        return all_flags(self.source, self.folder)

    def _best_flags(self, mix: str) -> Path:
        """Return the best by KLD of the likeliest files of at most the mix's bytes."""
        files = self._flags()
        budget = next(f.n_bytes for f in files if f.label == f"{mix}-default")
        likely = likeliest(files, budget, self.measurement, self.sensitivity)
        made = [self._llama(f.file_type, f.embedding) for f in likely]
        # Chosen on other sequences than those of the table: no luck in the draw.
        scored = ramgguf.evaluate(
            made, self.source, n_ctx=N_CTX, n_seq=8, seed=1, threads=self.threads
        ).results
        best = min(scored, key=lambda r: r.kld_mean)
        return self.folder / Path(best.model.path).name


def plan_by_alpha(
    measurement: Measurement, budget: int | str, sensitivity: Sensitivity | None
) -> Plan:
    """Return the plan by measured α alone, without priors."""
    return ramgguf.plan(
        measurement, budget, objective=SENSITIVITY, sensitivity=sensitivity, min_sqnr_db=0
    )


def likeliest(
    choices: Iterable[Flags], budget: int, measurement: Measurement, sensitivity: Sensitivity
) -> list[Flags]:
    """Return the N_FLAGS choices near the budget with the least predicted KLD, the least first.

    The budget is bytes of the tensors' data. Of choices that give the same types, one is kept.
    """
    possible = [f for f in near(choices, budget) if _is_possible(f, measurement)]
    different = {tuple(sorted(f.types.items())): f for f in reversed(possible)}.values()
    return sorted(different, key=lambda f: predicted_kld(f.types, measurement, sensitivity))[
        :N_FLAGS
    ]


def _is_possible(flags: Flags, measurement: Measurement) -> bool:
    """Return whether rows are whole blocks: llama.cpp crashes on embeddings that are not."""
    return all(
        t.row_length % GGML_QUANT_SIZES[GGMLQuantizationType[flags.types[t.name]]][0] == 0
        for t in measurement.tensors
    )


def predicted_kld(
    formats: Mapping[str, str], measurement: Measurement, sensitivity: Sensitivity
) -> float:
    """Return Σ α·NMSE of tensors in these formats, with our encoder's NMSE for anybody's file."""
    alpha = {t.name: t.alpha for t in sensitivity.tensors}
    return math.fsum(
        alpha.get(t.name, 0.0) * _nmse(t, formats[t.name]) for t in measurement.tensors
    )


def _nmse(tensor: TensorMeasurement, name: str) -> float:
    """Return the tensor's NMSE in the format, or in the next smaller one that was measured."""
    if name == tensor.source_format:
        return 0.0
    known = {p.format: p for p in tensor.points}
    if name in known:
        return known[name].nmse
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    smaller = [p for p in tensor.points if p.n_bytes * block <= size * tensor.n_weights]
    return smaller[-1].nmse if smaller else tensor.points[0].nmse
