"""Quantize as well as the time allows: steps in order of what they bring, each one gated.

fast plans by priors and searches scales. auto adds what calibration brings: an importance matrix,
error feedback (GPTQ, and coordinate descent after it) if its Hessians fit the time, then formats
for tensors with massive activations as input. best adds measured sensitivities and swaps by forward
passes. Where time is left, weights are then rounded anew, layer by layer, for the inputs that
quantized layers leave. Each step writes a candidate; it replaces the one before only if its KLD on
held-out text of every domain says so. What a step has measured is kept beside the model
(docs/effort.md).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ramgguf.calibrate import calibrate
from ramgguf.core.errors import BudgetError, EngineError, GGUFError, RamggufError
from ramgguf.core.files import free_bytes
from ramgguf.core.machine import available_memory
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Silent, followed_by
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_seconds
from ramgguf.evaluate import (
    kept_bytes,
)
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.client import WrongKindError
from ramgguf.llama.system import llama_installed
from ramgguf.plan import (
    JointLimit,
    PlanOptions,
    SizeLimit,
)
from ramgguf.plan.result import QuantizedInputs
from ramgguf.quantize.candidate import Candidate, Choice
from ramgguf.quantize.gate import FIRST_CTX, Gate
from ramgguf.quantize.output_paths import require_output
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once
from ramgguf.quantize.placing import placed
from ramgguf.quantize.protection import protected_formats
from ramgguf.quantize.quantized_inputs import Rounding, rounded_layers
from ramgguf.quantize.schedule import (
    DISK_SHARE,
    GATE_CTX,
    LAYER_SEQUENCES,
    MOST_ROUNDS,
    N_CTX,
    N_DOMAINS,
    N_TRIALS,
    Effort,
    Schedule,
    Step,
    rounds_within,
    schedule,
)
from ramgguf.quantize.step_cache import StepCache
from ramgguf.quantize.step_costs import measured_costs
from ramgguf.quants.encoders import DEFAULT_ENCODER
from ramgguf.quants.formats import expand
from ramgguf.quants.stand_in import (
    BESIDE_BYTES,
    FINE,
    ReadyStandIn,
    chosen_stand_in,
    stand_in_layout,
    write_stand_in,
)
from ramgguf.sensitivity import MassiveActivations, Sensitivity, massive_activations
from ramgguf.sensitivity import sensitivity as measure_sensitivity
from ramgguf.transform import can_scale, transform

AUTO_SECONDS = 300.0
TOKENS = "mix"
# A step is left out where it would end later than so many times the limit: that which was asked
# for, and that of auto, which is about five minutes.
LATE, LATE_BY_DEFAULT = 1.1, 1.25
clock = time.perf_counter
NEEDS_LLAMA = (
    "no llama.cpp here: planned by priors alone, without calibration, gates and score; "
    "pip install 'ramgguf[eval]' adds them"
)


@dataclass
class _Log:
    """What became of each step, for the terminal and for the plan's notes."""

    announce: Callable[[str], None]
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.announce(line)


class EffortRun:
    """One run of effort auto or best."""

    def __init__(
        self,
        model: Path,
        limit: SizeLimit,
        output: Path | None,
        effort: Effort,
        seconds: float | None,
        options: QuantizeOptions,
    ) -> None:
        self._model, self._limit, self._output = model, limit, output
        self._effort, self._seconds, self._options = effort, seconds, options
        self._threads, self._progress = options.threads, options.progress or Silent()
        self._announce, self._log = options.announce, _Log(options.announce)
        self._start = clock()
        self._n_candidates = 0
        self._stand_in: ReadyStandIn | None = None
        self._blocks: Path | None = None  # what error feedback has encoded

    def made(self) -> Quantized:
        """Return what was made: the best candidate, under its final name."""
        folder = require_output(
            self._model, self._output, force=self._options.force, n_bytes=0,
            splits=self._options.splits,
        )  # fmt: skip
        if not llama_installed():
            self._announce(f"effort {self._effort} is fast: {NEEDS_LLAMA}")
            return self._once(Choice(), self._output)
        with scratch_folder(folder, error=GGUFError) as scratch:
            self._scratch = scratch
            best = self._candidate(Choice())
            self._write = clock() - self._start
            if best.made.plan.mmproj is not None and isinstance(self._limit, JointLimit):
                # Gates see what the text loses: later candidates must not take the projector's.
                self._limit = self._limit.settled(best.made.plan.mmproj)
            try:
                best = self._improved(best)
            except WrongKindError as e:
                self._log.add(f"it falls back to fast: {e}")
            except (RamggufError, OSError) as e:
                self._log.add(f"ends here, with what was made so far: {e}")
            return self._finished(best)

    def _improved(self, best: Candidate) -> Candidate:
        """Return the best candidate after the steps that fit the time and pass the gate."""
        if best.made.plan.total_cost == 0:
            self._log.add("nothing to improve: the file holds every weight of the source")
            return best
        if self._seconds is not None and self._write >= self._seconds:
            took, asked = format_seconds(self._write), format_seconds(self._seconds)
            self._log.add(
                "importance matrix: left out, for the least possible, to plan by priors and "
                f"write, took {took}, and {asked} were asked for; give more with --time"
            )
            return best
        with open_gguf(self._model) as file:
            keeps_reference = self._room_beside_logits(file) >= 0
            beside = 0 if keeps_reference else best.made.n_bytes
            self._stand_in = self._fitting(file, beside)
            costs = measured_costs(
                file, self._scratch, self._write, best.path, TOKENS, self._threads, self._stand_in,
                decodes=keeps_reference and self._has_room_to_decode(file),
            )  # fmt: skip
            costs = replace(costs, keeps_reference=keeps_reference)
            self._cache = self._cache_of(file)
            self._blocks = self._cache.blocks
        self._gate = Gate(
            self._model, self._model if self._stand_in is None else self._stand_in.path,
            self._scratch, keeps_reference=keeps_reference, decodes=costs.decode > 0,
            threads=self._threads, progress=self._progress,
        )  # fmt: skip
        limit, begun = self._time_limit(), clock()
        planned = schedule(self._effort, limit, costs, self._cache.kept(), TOKENS)
        n_sequences = self._cache.begun(planned.n_sequences)
        self._schedule = replace(planned, n_sequences=n_sequences)
        decoded = " (decoded, as its formats are slower than the source)" * self._gate.decodes
        self._announce(
            f"measured here: {format_seconds(costs.write)} for a first file, "
            f"{format_seconds(costs.read)} to read {N_CTX} tokens, "
            f"{format_seconds(costs.round)} to score {N_DOMAINS * GATE_CTX}{decoded}, "
            f"{format_seconds(costs.feedback)} to round all weights with error feedback"
        )
        self._announce_schedule(planned, limit)
        most_rounds = planned.n_rounds  # of a gate; never more again once they are fewer
        latest = limit * (LATE_BY_DEFAULT if self._seconds is None else LATE)
        for number, step in enumerate(planned.steps, 1):
            spent, n_rounds = clock() - begun, most_rounds
            if number > 1:
                n_rounds = rounds_within(step, n_rounds, latest - spent, costs)
            if n_rounds == 0:
                self._log.add(
                    f"{step.name}: left out, {format_seconds(spent)} of {format_seconds(limit)} "
                    f"are spent, and it takes about {format_seconds(step.seconds)}"
                )
                continue
            most_rounds = n_rounds
            fewer = f", its gate with {n_rounds} per domain" if n_rounds < planned.n_rounds else ""
            self._announce(f"step {number} of {len(planned.steps)}: {step.name}{fewer}")
            after = [later.name for later in planned.steps[number:]]
            try:
                with followed_by(self._progress, after[0] if after else "verify"):
                    best = self._stepped(step, best, n_rounds)
            except (RamggufError, OSError) as e:
                self._log.add(f"{step.name}: left out, {e}")
        return best

    def _cache_of(self, file: GGUFFile) -> StepCache:
        """Return where steps keep what they measure; for this run only where the model's folder
        takes nothing.
        """
        try:
            return StepCache.of(file, self._model, TOKENS)
        except GGUFError as e:
            self._log.add(f"what is measured is not kept for later runs: {e}")
            return StepCache.of(file, self._scratch / self._model.name, TOKENS)

    def _stepped(self, step: Step, best: Candidate, n_rounds: int) -> Candidate:
        """Return the better of the best candidate and that of the step."""
        with followed_by(self._progress, "gate"):
            tried = self._tried(step, best)
        if tried is None:
            return best
        is_for_first = step.name == "massive activations"
        first = self._gate.on_first_tokens(best, tried) if is_for_first else None
        verdict = self._gate.verdict(best, tried, n_rounds)
        if first is None:
            taken, outcome = verdict.taken, str(verdict)
        else:
            taken = first.taken and verdict.harmless
            outcome = (
                f"{'taken' if taken else 'not taken'}: KLD × {first.ratio:.3f} on the first "
                f"{FIRST_CTX - 1} tokens of a text, × {verdict.ratio:.3f} on later ones"
            )
        self._log.add(f"{step.name}: {outcome}")
        worse, better = (best, tried) if taken else (tried, best)
        worse.remove()
        return better

    def _announce_schedule(self, planned: Schedule, limit: float) -> None:
        for line in planned.left_out:
            self._log.add(line)
        most = f" of at most {format_seconds(limit)}" if limit < 1e9 else ""
        n = len(planned.steps)
        self._announce(
            f"effort {self._effort}: {n} step{'s' * (n != 1)}, about "
            f"{format_seconds(planned.seconds)}{most}"
        )
        for number, step in enumerate(planned.steps, 1):
            self._announce(
                f"  {number}. {step.name}: {step.what}, about {format_seconds(step.seconds)}"
            )

    def _room_beside_logits(self, file: GGUFFile) -> float:
        """Return how much of the disk is left beside what the reference says at gates."""
        n_bytes = kept_bytes(file, GATE_CTX, MOST_ROUNDS * N_DOMAINS)
        return DISK_SHARE * free_bytes(self._scratch) - n_bytes

    def _has_room_to_decode(self, file: GGUFFile) -> bool:
        """Return whether two candidates in the source's types fit the disk, and passes run on the
        source itself.
        """
        return 2 * file.n_bytes <= self._room_beside_logits(file) and self._stand_in is None

    def _fitting(self, file: GGUFFile, beside: int) -> ReadyStandIn | None:
        """Return the stand-in that passes run on, so many bytes beside it; None: the model fits,
        and they run on that. Raises EngineError where none fits.
        """
        said: list[str] = []
        form = chosen_stand_in("auto", file, beside=beside, allowed=FINE, announce=said.append)
        if form is None:
            self._require_memory(file.n_bytes + beside)
            return None
        path = self._scratch / "stand-in.gguf"
        self._require_memory(stand_in_layout(file, form, path).n_bytes + beside + BESIDE_BYTES)
        self._log.add(f"{', '.join(said)}; gates compare with it")
        threads = self._threads or default_threads()
        write_stand_in(file, form, path, threads=threads, progress=self._progress)
        return ReadyStandIn(form, path)

    def _require_memory(self, needed: int) -> None:
        """Raise EngineError where what is decoded does not fit: the disk would be read for every
        token.
        """
        try:
            free = available_memory().n_bytes
        except BudgetError:  # a system that does not tell
            return
        if needed > free:
            raise EngineError(
                f"passes take {format_bytes(needed)} of memory, {format_bytes(free)} are free; "
                "--effort fast asks for none"
            )

    def _time_limit(self) -> float:
        """Return the seconds that all steps together may take."""
        if self._seconds is not None:
            return self._seconds - (clock() - self._start)
        return max(AUTO_SECONDS, 2 * self._write) if self._effort == "auto" else 1e9

    # --- the steps ---

    def _tried(self, step: Step, best: Candidate) -> Candidate | None:
        """Return the candidate of a step; None, and a line, where it has nothing to try."""
        now = best.choice
        match step.name:
            case "importance matrix":
                imatrix = self._matrix()
                return self._candidate(replace(now, imatrix=imatrix, scales=self._scales(imatrix)))
            case "massive activations":
                found = self._massive()
                names = self._options.plan.get("formats")
                pins = protected_formats(
                    found,
                    best.made.plan,
                    allowed=None if names is None else expand(names),
                    pinned=self._options.plan.get("pins", ()),
                )
                if pins:
                    self._announce(f"first tokens depend on {', '.join(pins)}")
                    return self._candidate(replace(now, pins=pins), best)
                self._log.add(f"{step.name}: no tensor needs more than it has")
                return None
            case "sensitivities" if self._stand_in is not None:
                self._log.add("sensitivities: left out, they run on the model, which does not fit")
                return None
            case "sensitivities":
                found_alphas = self._sensitivity(now, step.measuring)
                return self._candidate(replace(now, sensitivity=found_alphas), best)
            case "error feedback" if now.imatrix is not None:
                hessian = self._hessian()
                encoder = self._schedule.encoder
                return self._candidate(replace(now, encoder=encoder, hessian=hessian))
            case "quantized inputs" if self._stand_in is not None:
                self._log.add(f"{step.name}: left out, layers are of the model, which does not fit")
                return None
            case "quantized inputs" if now.hessian is None:
                self._log.add(f"{step.name}: left out, error feedback was not taken")
                return None
            case "quantized inputs":
                return self._for_quantized_inputs(best)
            case "swaps" if self._stand_in is not None:
                self._log.add("swaps: left out, they run on the model, which does not fit")
                return None
            case "swaps" if "speed" in self._options.plan:
                self._log.add(f"{step.name}: left out, they know nothing of speed")
                return None
            case "swaps" if now.scales is not None:
                self._log.add(f"{step.name}: left out, they are tried without scales")
                return None
            case "swaps":
                return self._candidate(replace(now, refine=N_TRIALS), best)
        self._log.add(f"{step.name}: left out, it builds on a matrix that was not taken")
        return None

    def _matrix(self) -> Path:
        """Return the importance matrix, made now or before; the Hessians come from these passes."""
        n = self._schedule.n_sequences
        path = self._cache.matrix(n)
        if path.exists():
            self._announce(f"taking {path}")
        else:
            self._calibrated(path, self._cache.hessian(n) if self._schedule.with_hessians else None)
            self._cache.forget_begun()
        return path

    def _hessian(self) -> Path:
        """Return the Hessians that belong to the matrix, made now or before."""
        path = self._cache.hessian(self._schedule.n_sequences)
        if path.exists():
            self._announce(f"taking {path}")
        else:
            self._calibrated(self._scratch / "again.imatrix.gguf", path)
        return path

    def _scales(self, imatrix: Path) -> Path | None:
        """Return scales by the matrix, made now or before; None where none are."""
        path = self._cache.scales(self._schedule.n_sequences)
        if path.exists():
            self._announce(f"taking {path}")
            return path
        try:
            with open_gguf(self._model) as file:
                if not can_scale(file):
                    return None
                # The gate tells whether the model computes the same, too.
                check = self._stand_in is None and file.n_bytes <= self._room_beside_logits(file)
            transform(
                self._model, path, imatrix, check=check,
                threads=self._threads, progress=self._progress,
            )  # fmt: skip
        except RamggufError as e:
            self._log.add(f"scales: left out, {e}")
            return None
        return path

    def _calibrated(self, imatrix: Path, hessian: Path | None) -> None:
        n = self._schedule.n_sequences
        found = calibrate(
            self._model, imatrix, tokens=TOKENS, n_sequences=n, n_ctx=N_CTX, hessian=hessian,
            partial=self._cache.partial(n), stand_in=self._stand_in or "auto", force=True,
            threads=self._threads, progress=self._progress,
        )  # fmt: skip
        if found.n_resumed:
            self._announce(f"a run that was killed had read {found.n_resumed} of its tokens")

    def _massive(self) -> MassiveActivations:
        """Return where massive activations are, measured now or before."""
        found = self._cache.massive()
        if found is not None:
            self._announce(f"taking {self._cache.massive_path}")
            return found
        found = massive_activations(
            self._model, stand_in=self._stand_in, threads=self._threads, progress=self._progress,
            announce=self._announce,
        )  # fmt: skip
        found.save(self._cache.massive_path)
        return found

    def _sensitivity(self, now: Choice, seconds: float) -> Sensitivity:
        """Return the sensitivities under the choice's matrix, measured now or before."""
        path = self._cache.sensitivity_path
        n = None if now.imatrix is None else self._schedule.n_sequences
        found = self._cache.sensitivity(n)
        if found is not None:
            self._announce(f"taking {path}")
            return found
        tag = "none" if n is None else str(n)
        journal = path.with_name(f"{path.name}.{tag}.partial")
        found = measure_sensitivity(
            self._model, encoder=DEFAULT_ENCODER, imatrix=now.imatrix,
            seconds=max(1.0, seconds), journal=journal, threads=self._threads,
            progress=self._progress, announce=self._announce,
        )  # fmt: skip
        found.save(path)
        journal.unlink(missing_ok=True)
        return found

    def _candidate(self, choice: Choice, best: Candidate | None = None) -> Candidate:
        """Write the file of a choice into the scratch folder; tensors that come out as in the best
        so far are copied.
        """
        self._n_candidates += 1
        path = self._scratch / f"candidate-{self._n_candidates}.gguf"
        before = None if best is None else best.made
        return Candidate(
            choice, self._once(choice, path, in_one_file=True, verify=False, before=before)
        )

    def _for_quantized_inputs(self, best: Candidate) -> Candidate:
        """Write the best file with its weights rounded layer by layer."""
        n = min(self._schedule.n_sequences, LAYER_SEQUENCES)
        inputs = QuantizedInputs(tokens=TOKENS, n_sequences=n, n_ctx=N_CTX)
        rounding = Rounding(
            inputs, self._cache.rounding, self._scratch, self._threads, self._progress
        )
        with rounded_layers(self._model, best.made, rounding) as rounded:
            self._n_candidates += 1
            path = self._scratch / f"candidate-{self._n_candidates}.gguf"
            options = replace(self._options, before=rounded, in_one_file=True, verify=False)
            made = quantize_once(self._model, None, path, options, from_plan=rounded.plan)
        return Candidate(best.choice, replace(made, measurement=rounded.measurement))

    def _once(self, choice: Choice, output: Path | None, **changed: Any) -> Quantized:
        """Write the file of a choice, with some of the options changed."""
        plan: PlanOptions = {**self._options.plan}
        if choice.sensitivity is not None:
            plan["sensitivity"] = choice.sensitivity
        if choice.pins:
            plan["pins"] = (*plan.get("pins", ()), *choice.pins)
        options = replace(
            self._options, encoder=choice.encoder, imatrix=choice.imatrix, hessian=choice.hessian,
            scales=choice.scales, kept_blocks=self._blocks,
            refine=choice.refine, refine_beside=self._cache.swaps if choice.refine else None,
            plan=plan, **changed,
        )  # fmt: skip
        return quantize_once(self._model, self._limit, output, options)

    def _finished(self, best: Candidate) -> Quantized:
        """Verify the best candidate and give it its name, or write it anew as shards."""
        plan = best.made.plan
        notes = tuple(f"effort {self._effort}: {line}" for line in self._log.lines)
        plan = plan.model_copy(update={"notes": (*plan.notes, *notes)})
        made = replace(best.made, plan=plan)
        done = placed(self._model, made, self._output, self._options)
        if self._blocks is not None:
            self._blocks.unlink(missing_ok=True)
        return replace(done, seconds={"effort": clock() - self._start})
