"""The smallest file whose measured KLD stays below a bound: plans of several budgets, written and
scored.

KLD falls by a factor that is nearly the same for every byte, so the next budget is interpolated in
log KLD. The search scores one held-out text, what it ends with is verified on another one that
nothing has used; where that says more than the bound, the search goes on with a stricter one.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ramgguf.core.errors import BudgetError, EngineError, GGUFError, PlanError
from ramgguf.core.mix import Part
from ramgguf.core.progress import Clock
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_count
from ramgguf.evaluate import SCORE_SECONDS, HeldOutScore, score_held_out
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.system import llama_installed
from ramgguf.measure.result import Measurement
from ramgguf.plan import plan
from ramgguf.quantize.output_paths import require_output
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once
from ramgguf.quantize.placing import placed
from ramgguf.quantize.preselection import NOTE
from ramgguf.quants.encoders import ENCODERS

TOLERANCE = 0.005  # of the bytes: how close to the smallest the search ends
MAX_TRIALS = 12
FIRST_BPW = 4.5
NATS_PER_BIT = 2 * math.log(2)  # of log KLD: 6 dB, as the square of an error falls
_MARGIN = 0.99  # of the bound, which the interpolation aims at
_INSIDE = 0.03  # of a bracket's width that a guess keeps from its ends


@dataclass
class _Bracket:
    """Budgets between which the smallest file lies: low is too small, high is enough.

    The KLD at low is None before a file that small was scored, at high before one was that is
    enough; a file of the source's own bytes loses nothing.
    """

    low: int
    high: int
    n_weights: int
    low_kld: float | None = None
    high_kld: float | None = None

    def next(self, bound: float, smallest: int) -> int:
        """Return the budget to try for a KLD of bound."""
        per_byte = NATS_PER_BIT * 8 / self.n_weights
        aim = _MARGIN * bound
        if self.low_kld is not None and self.high_kld is not None:
            per_byte = math.log(self.low_kld / self.high_kld) / (self.high - self.low)
        if self.low_kld is not None:
            guess = self.low + math.log(self.low_kld / aim) / max(per_byte, 1e-300)
        elif self.high_kld is not None:
            guess = self.high + math.log(self.high_kld / aim) / per_byte
        else:
            guess = FIRST_BPW * self.n_weights / 8
        inside = _INSIDE * (self.high - self.low)
        least = smallest if self.low_kld is None else self.low + inside
        return int(min(max(guess, least), self.high - inside))

    @property
    def is_closed(self) -> bool:
        return self.high - self.low <= max(1, TOLERANCE * self.high)


def smallest_within(
    model: Path,
    max_kld: float,
    output: Path | None,
    options: QuantizeOptions,
    measurement: Measurement | None = None,
) -> Quantized:
    """Write the smallest file whose KLD on held-out text is at most max_kld nats per token.

    Its score is the verifying one. Raises PlanError for a bound that is no positive number or that
    no file smaller than the source keeps, EngineError where llama.cpp cannot score.
    """
    if not (math.isfinite(max_kld) and max_kld > 0):
        raise PlanError(f"the KLD is bounded by {max_kld:g}; expected a positive number of nats")
    if not llama_installed():
        raise EngineError("a bound on the KLD is measured: pip install 'ramgguf[eval]'")
    with open_gguf(model, kind_check=True) as file:
        folder = require_output(
            model, output, force=options.force, n_bytes=file.n_bytes, splits=options.splits
        )
    with scratch_folder(folder, error=GGUFError) as scratch:
        return _Search(model, max_kld, options, scratch, measurement).result(output)


class _Search:
    def __init__(
        self,
        model: Path,
        max_kld: float,
        options: QuantizeOptions,
        scratch: Path,
        measurement: Measurement | None,
    ) -> None:
        self._model, self._max_kld, self._options = model, max_kld, options
        self._scratch, self._measurement = scratch, measurement
        self._clock, self._n_trials = Clock(), 0

    def result(self, output: Path | None) -> Quantized:
        with open_gguf(self._model) as file:
            source_bytes, n_weights = file.n_bytes, file.n_weights
        bound, low, low_kld = self._max_kld, None, None
        smallest = 1
        while True:
            best = self._smallest(bound, source_bytes, n_weights, smallest, low, low_kld)
            score = self._scored(best.made, "score")
            found = score.overall().kld.value
            self._options.announce(
                f"{format_bytes(best.made.n_bytes)}: verified with KLD {found:.4g} on other text, "
                f"{'within' if found <= self._max_kld else 'above'} {self._max_kld:g}"
            )
            if found <= self._max_kld:
                return self._finished(best.made, score, output)
            # The other text loses more: the bound on this one is stricter by as much.
            bound = min(bound, best.kld) * self._max_kld / found
            low, low_kld = best.budget, best.kld
            self._require_trials(best.budget, found)

    def _require_trials(self, n_bytes: int, kld: float) -> None:
        if self._n_trials >= MAX_TRIALS:
            raise PlanError(
                f"after {format_count(self._n_trials, 'file')} the KLD is still {kld:.4g} at "
                f"{format_bytes(n_bytes)}, above {self._max_kld:g}; raise --max-kld, or give "
                "--calibrate mix"
            )

    def _smallest(
        self,
        bound: float,
        source_bytes: int,
        n_weights: int,
        smallest: int,
        low: int | None,
        low_kld: float | None,
    ) -> "_Trial":
        bracket = _Bracket(low or 0, source_bytes, n_weights, low_kld)
        best: _Trial | None = None
        while not bracket.is_closed and (best is None or self._n_trials < MAX_TRIALS):
            budget = bracket.next(bound, smallest)
            try:
                trial = self._tried(budget)
            except BudgetError as e:
                if e.smallest is None or e.smallest <= smallest:
                    raise
                smallest, bracket.low = e.smallest, max(bracket.low, e.smallest - 1)
                continue
            if trial.kld <= bound:
                if best is not None:
                    best.made.paths[0].unlink(missing_ok=True)
                best = trial
                bracket.high, bracket.high_kld = trial.made.n_bytes, max(trial.kld, 1e-9)
            else:
                trial.made.paths[0].unlink(missing_ok=True)
                bracket.low, bracket.low_kld = max(budget, bracket.low), trial.kld
                self._require_trials(trial.made.n_bytes, trial.kld)
        if best is None:
            raise PlanError(
                f"no file that is smaller than the source has a KLD of at most {bound:.3g} nats"
                + (f": at {format_bytes(bracket.low)} it is {bracket.low_kld:.3g}"
                   if bracket.low_kld is not None else "")
            )  # fmt: skip
        return best

    def _tried(self, budget: int) -> "_Trial":
        """Write the best file of that budget and score it."""
        if self._measurement is not None:  # a budget too small fails before anything is written
            plan(self._measurement, budget, **self._options.plan)
        self._n_trials += 1
        path = self._scratch / f"trial-{self._n_trials}.gguf"
        options = replace(self._options, verify=False, in_one_file=True, force=False)
        # An encoder that plans by another one's errors measures its own for each plan.
        ready = None if ENCODERS[options.encoder].plans_by else self._measurement
        with self._clock.stage("trials"):
            made = quantize_once(self._model, budget, path, options, measurement=ready)
        if NOTE not in made.plan.notes:  # else it has little but the formats of this budget
            self._measurement = made.measurement
        with self._clock.stage("score"):
            kld = self._scored(made, "gate").overall().kld.value
        self._options.announce(
            f"file {self._n_trials}: {format_bytes(made.n_bytes)}, {made.plan.bpw:.3f} bpw: "
            f"KLD {kld:.4g}"
        )
        return _Trial(budget, kld, made)

    def _scored(self, made: Quantized, part: Part) -> HeldOutScore:
        (found,) = score_held_out(
            made.paths[:1], self._model, part=part, seconds=SCORE_SECONDS,
            threads=self._options.threads, progress=self._options.progress,
        )  # fmt: skip
        return found

    def _finished(self, made: Quantized, score: HeldOutScore, output: Path | None) -> Quantized:
        """Give the file its name."""
        options = self._options
        note = (
            f"the smallest of {format_count(self._n_trials, 'file')} with a KLD of at most "
            f"{self._max_kld:g} nats per token on held-out text"
        )
        planned = made.plan.model_copy(update={"notes": (*made.plan.notes, note)})
        with self._clock.stage("verify"):
            done = placed(self._model, replace(made, plan=planned, score=score), output, options)
        return done if options.splits else replace(done, seconds=self._clock.seconds)


@dataclass(frozen=True)
class _Trial:
    """A file that was written for a budget, and its KLD on the text of the search."""

    budget: int
    kld: float
    made: Quantized
