"""Quantize as well as the time allows: steps in order of what they bring, each one gated.

fast plans by priors and searches scales. auto adds what calibration brings: an importance matrix,
error feedback (GPTQ, and coordinate descent after it) if its Hessians fit the time, then formats
for tensors that meet massive activations. best adds measured sensitivities and swaps by forward
passes. Where time is left, weights are then rounded anew, layer by layer, for the inputs that
quantized layers leave. Each step writes a candidate; it replaces the one before only if its KLD on
held-out text of every domain says so. What a step has measured is kept beside the model
(docs/effort.md).
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from ramgguf.calibrate import calibrate
from ramgguf.core.errors import BudgetError, EngineError, GGUFError, PlanError, RamggufError
from ramgguf.core.files import free_bytes, refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.machine import available_memory
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent, followed_by
from ramgguf.core.scratch import scratch_folder
from ramgguf.core.units import format_bytes, format_seconds
from ramgguf.evaluate import (
    DRAFT_SECONDS,
    SCORE_SECONDS,
    DraftAgreement,
    HeldOutScore,
    draft_agreement,
    kept_bytes,
    score_held_out,
)
from ramgguf.gguf.hub import beside, local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.client import WrongKindError
from ramgguf.llama.format_speed import SpeedProfile
from ramgguf.llama.system import llama_installed
from ramgguf.measure.result import Measurement
from ramgguf.plan import (
    ByteLimit,
    JointLimit,
    PlanOptions,
    SizeLimit,
    SpeedLimit,
    size_limit,
)
from ramgguf.plan.result import Plan, QuantizedInputs
from ramgguf.quantize.gate import Verdict, judge
from ramgguf.quantize.kld_target import smallest_within
from ramgguf.quantize.modelfile import modelfile_path, write_modelfile
from ramgguf.quantize.output_paths import check_destination
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once
from ramgguf.quantize.placing import placed
from ramgguf.quantize.projector import check_projector, with_projector
from ramgguf.quantize.protection import protected_formats
from ramgguf.quantize.quantized_inputs import Rounding, rounded_layers
from ramgguf.quantize.schedule import (
    DISK_SHARE,
    EFFORTS,
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
from ramgguf.quantize.speed_target import fast_enough, speed_limit
from ramgguf.quantize.step_cache import StepCache
from ramgguf.quantize.step_costs import measured_costs
from ramgguf.quants.decoded import write_decoded
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName
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
SCORE_SHARE = 0.15  # of the time that was asked for
# A step is left out where it would end later than so many times the limit: that which was asked
# for, and that of auto, which is about five minutes.
LATE, LATE_BY_DEFAULT = 1.1, 1.25
FIRST_CTX, FIRST_ROUNDS = 16, 6  # the windows that show what becomes of first tokens
clock = time.perf_counter
NEEDS_LLAMA = (
    "no llama.cpp here: planned by priors alone, without calibration, gates and score; "
    "pip install 'ramgguf[eval]' adds them"
)


_OF_PROJECTORS = "a projector predicts no text, so that nothing can be calibrated or scored"


@protected()
def quantize(
    model: str | Path,
    budget: int | str | SizeLimit | None = None,
    output: str | Path | None = None,
    *,
    effort: Effort | None = None,
    seconds: float | None = None,
    score: bool = False,
    lora: str | Path | None = None,
    max_kld: float | None = None,
    min_speed: float | None = None,
    min_prompt_speed: float | None = None,
    speeds: SpeedProfile | None = None,
    from_plan: Plan | None = None,
    measurement: Measurement | None = None,
    encoder: EncoderName | None = None,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    scales: str | Path | None = None,
    allow_requantize: bool = False,
    refine: int = 0,
    split_max_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    mmproj_output: str | Path | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
    **options: Unpack[PlanOptions],
) -> Quantized:
    """Write the best GGUF that keeps to the budget and return what was made.

    model is a GGUF file, a checkpoint's folder, which is converted first, or an address on the hub;
    lora is an adapter that is merged into it (hub.local_path says which). Needs a budget (bytes,
    text such as 16GB, 4.5bpw or 30%, or a SizeLimit) or a ready plan. output is by default beside
    the model and named after the plan's bits per weight.

    effort fast plans by priors; auto and best decide by themselves what they do, within the seconds
    (auto: five minutes, or twice what writing takes; best: what it needs), and keep what they
    measure in MODEL.effort. None is auto; with seconds, best; with one of the steps below, fast.
    Without llama-cpp-python, and for a projector (mmproj), which takes a budget in bytes only, all
    are fast, and announce gets a line. With score, what was written is scored on held-out text.

    max_kld, in place of a budget, is how many nats per token the file may lose: the smallest that
    keeps to it on held-out text is searched, with effort fast and what is given.

    min_speed and min_prompt_speed, beside a budget, are tokens per second of generation and of
    prompts of 512 tokens: formats are chosen by their speed on this machine, measured once and
    kept (or that of speeds), and the file is timed. Raises BudgetError with the largest speed
    that is possible, and what limits it, where that is less.

    Where the budget is a limit of memory with what was measured of a vision projector, or the ready
    plan has one, the projector's file is written as well: mmproj_output, by default beside it.

    from_plan, measurement, encoder, imatrix, hessian, scales and refine are for effort fast. A
    ready measurement saves measuring again; imatrix and hessian are as in measure, scales a file
    that transform has made, which goes with a matrix and without refine. Without a ready plan,
    refine is how many swaps of formats are tried by forward passes, on the workers of an executor
    if there is one; announce gets their cost. An encoder that plans by another one's errors (gptq
    by those of search) chooses formats by these, if there is no ready plan or measurement; a
    sensitivity must suit these: without Hessians. options are those of plan.

    Raises RamggufError; an older output is then untouched.
    """
    start = clock()
    model = local_path(model, lora=lora, announce=announce)
    settings = QuantizeOptions(
        encoder or DEFAULT_ENCODER, imatrix, hessian, scales, allow_requantize, refine,
        split_max_bytes=split_max_bytes, force=force, verify=verify, threads=threads,
        executor=executor, progress=progress, announce=announce, plan=options,
    )  # fmt: skip
    explicit = {
        "from_plan": from_plan, "measurement": measurement, "imatrix": imatrix,
        "hessian": hessian, "scales": scales, "refine": refine or None,
        "sensitivity": options.get("sensitivity"),
        "objective": options.get("objective"),
        "encoder": encoder, "max_kld": max_kld,
    }  # fmt: skip
    given = [name for name, value in explicit.items() if value is not None]
    if effort is not None and effort not in EFFORTS:
        raise PlanError(f"effort {effort!r} is none of {', '.join(EFFORTS)}")
    beside_path = None if mmproj_output is None else Path(mmproj_output)
    check_projector(
        budget, from_plan, beside_path, output_of_model=None if output is None else Path(output),
        force=force,
    )  # fmt: skip
    is_for_ollama = options.get("target") == "ollama"
    if is_for_ollama:
        _require_modelfile(output, split_max_bytes, force=force)
    level = effort or default_effort(is_explicit=bool(given), has_time=seconds is not None)
    if scales is not None and (refine or from_plan is not None or measurement is not None):
        raise PlanError(
            "scales go with what is measured now: give no refinement, plan or measurement"
        )
    is_timed = min_speed is not None or min_prompt_speed is not None
    if is_timed and (max_kld is not None or from_plan is not None or refine):
        raise PlanError(
            "a least speed goes with a budget or memory: give no max_kld, plan or refinement"
        )
    if _is_projector(model):
        needing = {"max_kld": max_kld is not None, "a least speed": is_timed, "refine": refine}
        _require_bytes(model, budget, [name for name, is_given in needing.items() if is_given])
        if level != "fast":
            announce(f"effort {level} is fast: {_OF_PROJECTORS}")
        elif score:
            announce(f"not scored: {_OF_PROJECTORS}")
        level, seconds, score = "fast", None, False
    if level == "fast":
        if seconds is not None:
            raise PlanError("effort fast takes what it takes; seconds are for auto and best")
        if max_kld is None and not is_timed:
            made = quantize_once(
                model, budget, output, settings, from_plan=from_plan, measurement=measurement
            )
        elif max_kld is not None:
            if budget is not None or from_plan is not None or refine:
                raise PlanError("max_kld finds the budget: give no budget, plan or refinement")
            target = None if output is None else Path(output)
            made = smallest_within(model, max_kld, target, settings, measurement)
    else:
        if given:
            raise PlanError(
                f"effort {level} decides by itself what it uses, and {', '.join(given)} was given"
            )
        if budget is None:
            raise PlanError("a budget, memory or a plan is needed, and none was given")
        # The score is part of what the time is for.
        left = seconds and seconds - (seconds_to_score(seconds) if score else 0.0)
        target = None if output is None else Path(output)
        settings = replace(settings, executor=None)  # steps are measured and run on this machine
        if not is_timed:
            made = _Run(model, size_limit(budget), target, level, left, settings).made()
    if is_timed:
        if budget is None:
            raise PlanError("a least speed goes with a budget or memory")
        speed = speed_limit(
            model, min_speed or 0.0, min_prompt_speed or 0.0, names=options.get("formats"),
            profile=speeds, threads=threads, progress=progress, announce=announce,
        )  # fmt: skip
        target = None if output is None else Path(output)
        steps = None if level == "fast" else (level, left)
        made = _timed(model, size_limit(budget), target, settings, speed, steps, measurement)
    if is_for_ollama:
        n_ctx = made.plan.memory.n_ctx if made.plan.memory else None
        modelfile = write_modelfile(made.paths[0], n_ctx, force=force)
        made = replace(made, modelfile=modelfile)
    if made.plan.mmproj is not None:
        made = with_projector(made, beside_path, settings)
    if not score:
        return made

    def time_left(most: float) -> float:
        return most if seconds is None else max(0.0, min(most, seconds - (clock() - start)))

    if made.score is None:
        left_for_score = time_left(SCORE_SECONDS)
        found = scored(made, model, threads, progress, announce, left_for_score)
        made = replace(made, score=found)
    agreed = with_draft(made, model, threads, progress, announce, time_left(DRAFT_SECONDS))
    return replace(made, draft=agreed)


def _timed(
    model: Path,
    limit: SizeLimit,
    output: Path | None,
    options: QuantizeOptions,
    speed: SpeedLimit,
    steps: tuple[Effort, float | None] | None,
    measurement: Measurement | None,
) -> Quantized:
    """Write a file that is fast enough: by priors, then with the steps of an effort, if any.

    The file by priors tells how fast the steps' formats will be.
    """
    start = clock()
    folder = (output or beside(model, "output")).absolute().parent
    with open_gguf(model) as file:
        wanted = output or beside(model, model.name)
        check_destination(wanted, output is not None and not options.force, file.n_bytes)
    trial = replace(options, verify=False, split_max_bytes=None, force=True)

    def bound(speed: SpeedLimit) -> QuantizeOptions:
        return replace(trial, plan={**options.plan, "speed": speed})

    with scratch_folder(folder, error=GGUFError) as scratch:
        path = scratch / "timed.gguf"
        made, speed = fast_enough(
            lambda speed: quantize_once(
                model, limit, path, bound(speed), measurement=measurement
            ),
            speed, announce=options.announce,
        )  # fmt: skip
        if steps is not None:
            level, seconds = steps
            made, _ = fast_enough(
                lambda speed: _Run(model, limit, path, level, seconds, bound(speed)).made(),
                speed, relaxes=False, announce=options.announce,
            )  # fmt: skip
        done = placed(model, made, output, options)
    return replace(done, seconds={"until fast enough": clock() - start})


def _is_projector(model: Path) -> bool:
    with open_gguf(model) as file:
        return file.is_projector


def _require_bytes(
    model: Path, budget: int | str | SizeLimit | None, needing: Sequence[str]
) -> None:
    """Raise where more is asked of a projector than bytes."""
    if needing:
        raise PlanError(
            f"{model}: {', '.join(needing)} cannot be kept to: {_OF_PROJECTORS}; give a budget"
        )
    if not isinstance(budget, int | str | ByteLimit | None):
        raise PlanError(
            f"{model}: is a projector, which has no context of its own: give a budget in bytes; "
            "the memory of the language model counts it with --mmproj"
        )


def _require_modelfile(output: str | Path | None, split: int | None, *, force: bool) -> None:
    """Raise, before any work, where a Modelfile cannot be written or would be of no use."""
    if split is not None:
        raise PlanError("Ollama imports one file: leave --split-max-size out, or --for ollama")
    if output is not None:
        refuse_existing(modelfile_path(Path(output)), force=force, error=GGUFError)


def default_effort(*, is_explicit: bool, has_time: bool) -> Effort:
    """Return fast where single steps are asked for, best where a time is given, else auto."""
    if is_explicit:
        return "fast"
    return "best" if has_time else "auto"


def seconds_to_score(seconds: float) -> float:
    """Return how many of the seconds that were asked for the score at the end is given."""
    return min(SCORE_SECONDS, SCORE_SHARE * seconds)


def scored(
    made: Quantized,
    model: Path,
    threads: int | None,
    progress: Progress | None,
    announce: Callable[[str], None],
    seconds: float = SCORE_SECONDS,
) -> HeldOutScore | None:
    """Return the score of what was written; None, and a line, where llama.cpp cannot score it."""
    try:
        (found,) = score_held_out(
            made.paths[:1], model, seconds=seconds, threads=threads, progress=progress
        )
    except EngineError as e:
        announce(f"not scored: {e}")
        return None
    return found


def with_draft(
    made: Quantized,
    model: Path,
    threads: int | None,
    progress: Progress | None,
    announce: Callable[[str], None],
    seconds: float,
) -> DraftAgreement | None:
    """Return how often the draft model of the plan's memory agrees; None where there is none, or
    llama.cpp cannot run them; announce gets why.
    """
    beside = made.plan.memory.beside if made.plan.memory else ()
    draft = next((Path(use.path) for use in beside if use.kind == "draft"), None)
    if draft is None:
        return None
    try:
        return draft_agreement(
            draft, model, made.paths[0], seconds=seconds, threads=threads, progress=progress
        )
    except EngineError as e:
        announce(f"what the draft model proposes was not measured: {e}")
        return None


@dataclass(frozen=True)
class Choice:
    """How a candidate is made."""

    encoder: EncoderName = DEFAULT_ENCODER
    imatrix: Path | None = None
    hessian: Path | None = None
    scales: Path | None = None
    sensitivity: Sensitivity | None = None
    pins: tuple[str, ...] = ()
    refine: int = 0


@dataclass
class _Candidate:
    """A file in the scratch folder, what made it, and its score at the gate once it has one.

    decoded is the file that gates read instead, if there is one.
    """

    choice: Choice
    made: Quantized
    score: HeldOutScore | None = None
    decoded: Path | None = None

    @property
    def path(self) -> Path:
        return self.made.paths[0]

    def remove(self) -> None:
        """Remove its files."""
        for path in (self.path, self.decoded):
            if path is not None:
                path.unlink(missing_ok=True)


@dataclass
class _Log:
    """What became of each step, for the terminal and for the plan's notes."""

    announce: Callable[[str], None]
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        self.announce(line)


class _Run:
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
        self._keeps_reference = False
        self._decodes = False
        self._n_rounds = 0
        self._blocks: Path | None = None  # what error feedback has encoded

    def made(self) -> Quantized:
        """Return what was made: the best candidate, under its final name."""
        if self._output is not None and not self._options.force:
            refuse_existing(self._output, force=False, error=GGUFError)
        if not llama_installed():
            self._announce(f"effort {self._effort} is fast: {NEEDS_LLAMA}")
            return self._once(Choice(), self._output)
        folder = (self._output or beside(self._model, "output")).absolute().parent
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
            except (EngineError, OSError) as e:
                self._log.add(f"ends here, with what was made so far: {e}")
            return self._finished(best)

    def _improved(self, best: _Candidate) -> _Candidate:
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
            self._keeps_reference = self._room_beside_logits(file) >= 0
            beside = 0 if self._keeps_reference else best.made.n_bytes
            self._stand_in = self._fitting(file, beside)
            costs = measured_costs(
                file, self._scratch, self._write, best.path, TOKENS, self._threads, self._stand_in,
                decodes=self._has_room_to_decode(file),
            )  # fmt: skip
            self._decodes = costs.decode > 0
            costs = replace(costs, keeps_reference=self._keeps_reference)
            self._cache = StepCache.of(file, self._model, TOKENS)
            self._blocks = self._cache.blocks
        limit, begun = self._time_limit(), clock()
        planned = schedule(self._effort, limit, costs, self._cache.kept(), TOKENS)
        n_sequences = self._cache.begun(planned.n_sequences)
        self._schedule = replace(planned, n_sequences=n_sequences)
        decoded = " (decoded, as its formats are slower than the source)" * self._decodes
        self._announce(
            f"measured here: {format_seconds(costs.write)} for a first file, "
            f"{format_seconds(costs.read)} to read {N_CTX} tokens, "
            f"{format_seconds(costs.round)} to score {N_DOMAINS * GATE_CTX}{decoded}, "
            f"{format_seconds(costs.feedback)} to round all weights with error feedback"
        )
        self._announce_schedule(planned, limit)
        self._n_rounds = planned.n_rounds
        latest = limit * (LATE_BY_DEFAULT if self._seconds is None else LATE)
        for number, step in enumerate(planned.steps, 1):
            spent, n_rounds = clock() - begun, self._n_rounds  # which never become more again
            if number > 1:
                n_rounds = rounds_within(step, n_rounds, latest - spent, costs)
            if n_rounds == 0:
                self._log.add(
                    f"{step.name}: left out, {format_seconds(spent)} of {format_seconds(limit)} "
                    f"are spent, and it takes about {format_seconds(step.seconds)}"
                )
                continue
            self._n_rounds = n_rounds
            fewer = f", its gate with {n_rounds} per domain" if n_rounds < planned.n_rounds else ""
            self._announce(f"step {number} of {len(planned.steps)}: {step.name}{fewer}")
            after = [later.name for later in planned.steps[number:]]
            try:
                with followed_by(self._progress, after[0] if after else "verify"):
                    best = self._stepped(step, best)
            except RamggufError as e:
                self._log.add(f"{step.name}: left out, {e}")
        return best

    def _stepped(self, step: Step, best: _Candidate) -> _Candidate:
        """Return the better of the best candidate and that of the step."""
        with followed_by(self._progress, "gate"):
            tried = self._tried(step, best)
        if tried is None:
            return best
        first = self._first_tokens(best, tried) if step.name == "massive activations" else None
        verdict = self._verdict(best, tried)
        if first is None:
            taken, told = verdict.taken, str(verdict)
        else:
            taken = first.taken and verdict.harmless
            told = (
                f"{'taken' if taken else 'not taken'}: KLD × {first.ratio:.3f} on the first "
                f"{FIRST_CTX - 1} tokens of a text, × {verdict.ratio:.3f} on later ones"
            )
        self._log.add(f"{step.name}: {told}")
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
        fits = 2 * file.n_bytes <= self._room_beside_logits(file)
        return fits and self._keeps_reference and self._stand_in is None

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

    @property
    def _reference(self) -> Path:
        """What gates compare with."""
        return self._stand_in.path if self._stand_in is not None else self._model

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

    def _tried(self, step: Step, best: _Candidate) -> _Candidate | None:
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
        """Return what first tokens meet, measured now or before."""
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

    def _candidate(self, choice: Choice, best: _Candidate | None = None) -> _Candidate:
        """Write the file of a choice into the scratch folder; tensors that come out as in the best
        so far are copied.
        """
        self._n_candidates += 1
        path = self._scratch / f"candidate-{self._n_candidates}.gguf"
        before = None if best is None else best.made
        return _Candidate(
            choice, self._once(choice, path, split_max_bytes=None, verify=False, before=before)
        )

    def _for_quantized_inputs(self, best: _Candidate) -> _Candidate:
        """Write the best file with its weights rounded layer by layer."""
        n = min(self._schedule.n_sequences, LAYER_SEQUENCES)
        inputs = QuantizedInputs(tokens=TOKENS, n_sequences=n, n_ctx=N_CTX)
        rounding = Rounding(
            inputs, self._cache.rounding, self._scratch, self._threads, self._progress
        )
        with rounded_layers(self._model, best.made, rounding) as rounded:
            self._n_candidates += 1
            path = self._scratch / f"candidate-{self._n_candidates}.gguf"
            options = replace(self._options, before=rounded, split_max_bytes=None, verify=False)
            made = quantize_once(self._model, None, path, options, from_plan=rounded.plan)
        return _Candidate(best.choice, replace(made, measurement=rounded.measurement))

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

    # --- the gate ---

    def _verdict(self, best: _Candidate, tried: _Candidate) -> Verdict:
        """Return whether the candidate is better; the one before is scored once only."""
        unscored = [one for one in (best, tried) if one.score is None]
        found = score_held_out(
            [self._as_read(one) for one in unscored], self._reference, part="gate", n_ctx=GATE_CTX,
            seconds=None, max_rounds=self._n_rounds, threads=self._threads,
            reference_logits=self._kept_logits("gate"), progress=self._progress,
        )  # fmt: skip
        for one, score in zip(unscored, found, strict=True):
            one.score = score
        assert best.score is not None
        assert tried.score is not None
        return judge(best.score, tried.score)

    def _first_tokens(self, best: _Candidate, tried: _Candidate) -> Verdict:
        """Return whether the first tokens of texts are better predicted."""
        before, after = score_held_out(
            [self._as_read(best), self._as_read(tried)], self._reference, part="gate",
            n_ctx=FIRST_CTX, first_target=1,
            seconds=None, max_rounds=FIRST_ROUNDS, threads=self._threads,
            reference_logits=self._kept_logits("first"), progress=self._progress,
        )  # fmt: skip
        return judge(before, after)

    def _as_read(self, candidate: _Candidate) -> Path:
        """Return the file that gates read: the candidate, or that decoded."""
        if not self._decodes:
            return candidate.path
        if candidate.decoded is None:
            path = candidate.path.with_suffix(".decoded.gguf")
            with open_gguf(candidate.path) as file, open_gguf(self._model) as source:
                write_decoded(
                    file, source, path, threads=self._threads or default_threads(),
                    progress=self._progress,
                )  # fmt: skip
            candidate.decoded = path
        return candidate.decoded

    def _kept_logits(self, name: str) -> Path | None:
        """Return where the reference's logits are kept, if they are."""
        return self._scratch / f"{name}.logits" if self._keeps_reference else None

    def _finished(self, best: _Candidate) -> Quantized:
        """Verify the best candidate and give it its name, or write it anew as shards."""
        plan = best.made.plan
        notes = tuple(f"effort {self._effort}: {line}" for line in self._log.lines)
        plan = plan.model_copy(update={"notes": (*plan.notes, *notes)})
        made = replace(best.made, plan=plan)
        done = placed(self._model, made, self._output, self._options)
        if self._blocks is not None:
            self._blocks.unlink(missing_ok=True)
        return replace(done, seconds={"effort": clock() - self._start})
