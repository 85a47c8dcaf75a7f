"""Quantize: the whole command, from what is asked for to a file that is written and scored.

Efforts auto and best run steps (effort); fast plans and writes once (pipeline), or as often as a
least speed (speed_target) or a largest loss (kld_target) needs.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from ramgguf.core.errors import BudgetError, EngineError, GGUFError, PlanError
from ramgguf.core.files import refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.progress import Progress
from ramgguf.core.scratch import scratch_folder
from ramgguf.evaluate import (
    DRAFT_SECONDS,
    SCORE_SECONDS,
    DraftAgreement,
    HeldOutScore,
    draft_agreement,
    score_held_out,
)
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.format_speed import SpeedProfile
from ramgguf.measure.result import Measurement
from ramgguf.plan import ByteLimit, PlanOptions, SizeLimit, SpeedLimit, size_limit
from ramgguf.plan.result import Plan
from ramgguf.quantize.effort import EffortRun
from ramgguf.quantize.kld_target import smallest_within
from ramgguf.quantize.modelfile import modelfile_path, write_modelfile
from ramgguf.quantize.output_paths import require_output
from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once
from ramgguf.quantize.placing import placed
from ramgguf.quantize.projector import check_projector, with_projector
from ramgguf.quantize.schedule import EFFORTS, Effort
from ramgguf.quantize.speed_target import fast_enough, speed_limit
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName

SCORE_SHARE = 0.15  # of the time that was asked for
clock = time.perf_counter
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
    target = None if output is None else Path(output)
    beside_path = None if mmproj_output is None else Path(mmproj_output)
    check_projector(budget, from_plan, beside_path, output_of_model=target, force=force)
    is_for_ollama = options.get("target") == "ollama"
    if is_for_ollama:
        _require_modelfile(target, split_max_bytes, force=force)
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
        if max_kld is not None and (budget is not None or from_plan is not None or refine):
            raise PlanError("max_kld finds the budget: give no budget, plan or refinement")
    elif given:
        raise PlanError(
            f"effort {level} decides by itself what it uses, and {', '.join(given)} was given"
        )
    if budget is None and is_timed:
        raise PlanError("a least speed goes with a budget or memory")
    if budget is None and level != "fast":
        raise PlanError("a budget, memory or a plan is needed, and none was given")
    # The score is part of what the time is for.
    left = seconds and seconds - (seconds_to_score(seconds) if score else 0.0)
    if level != "fast":
        settings = replace(settings, executor=None)  # steps are measured and run on this machine
    if max_kld is not None:
        made = smallest_within(model, max_kld, target, settings, measurement)
    elif is_timed and budget is not None:
        speed = speed_limit(
            model, min_speed or 0.0, min_prompt_speed or 0.0, names=options.get("formats"),
            profile=speeds, threads=threads, progress=progress, announce=announce,
        )  # fmt: skip
        steps = None if level == "fast" else (level, left)
        made = _timed(model, size_limit(budget), target, settings, speed, steps, measurement)
    elif level == "fast" or budget is None:
        made = quantize_once(
            model, budget, target, settings, from_plan=from_plan, measurement=measurement
        )
    else:
        made = EffortRun(model, size_limit(budget), target, level, left, settings).made()
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
    with open_gguf(model) as file:
        folder = require_output(
            model, output, force=options.force, n_bytes=file.n_bytes, splits=options.splits
        )
    trial = replace(options, verify=False, in_one_file=True, force=True)

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

            def with_steps(speed: SpeedLimit) -> Quantized:
                left = None if seconds is None else max(1.0, seconds - (clock() - start))
                better = scratch / "better.gguf"
                return EffortRun(model, limit, better, level, left, bound(speed)).made()

            try:
                made, _ = fast_enough(with_steps, speed, relaxes=False, announce=options.announce)
            except BudgetError as e:  # the file by priors is fast enough
                line = f"effort {level}: planned by priors alone, for with its steps {e}"
                options.announce(line)
                noted = made.plan.model_copy(update={"notes": (*made.plan.notes, line)})
                made = replace(made, plan=noted)
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


def _require_modelfile(output: Path | None, split: int | None, *, force: bool) -> None:
    """Raise, before any work, where a Modelfile cannot be written or would be of no use."""
    if split is not None:
        raise PlanError("Ollama imports one file: leave --split-max-size out, or --for ollama")
    if output is not None:
        refuse_existing(modelfile_path(output), force=force, error=GGUFError)


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
