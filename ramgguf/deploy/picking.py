"""From a model to a file that is proven to run here: measure, plan, write, try, and score."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from ramgguf.core.errors import BudgetError, EngineError, GGUFError
from ramgguf.core.files import put_in_place
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_bytes, format_count, format_seconds
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.division_rooms import MemoryRequest
from ramgguf.deploy.memory import MemoryLimit
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate import evaluate
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.hub import local_path
from ramgguf.llama.format_speed import SpeedProfile
from ramgguf.measure import measure
from ramgguf.plan import PlanOptions, curve
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.result import Plan
from ramgguf.quantize import Effort, default_output, free_output, quantize, seconds_to_score
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName

_MOST_ROUNDS = 4
_MARGIN = 1.01
clock = time.perf_counter


@dataclass(frozen=True)
class PickRequest:
    """The requirements on the file; least speeds are tokens per second of generation and prompts.

    speeds are those of formats here, measured if need be (quantize.speed_target). The score is
    taken on n_seq sequences of n_ctx tokens; n_seq 0 takes none. Sizes are tried with plans by
    priors; effort auto or best then makes the file of that size. effort_seconds are for all of it,
    from measuring to the score.
    """

    trial: CheckRequest
    min_speed: float = 0.0
    min_prompt_speed: float = 0.0
    speeds: SpeedProfile | None = None
    encoder: EncoderName = DEFAULT_ENCODER
    n_seq: int = 8
    n_ctx: int = 512
    effort: Effort = "fast"
    effort_seconds: float | None = None

    @property
    def is_timed(self) -> bool:
        """Whether a speed is asked for."""
        return self.min_speed != 0 or self.min_prompt_speed != 0

    def effort_seconds_left(self, spent: float, trial: float) -> float | None:
        """Return what is left for the effort's file: of what was asked, less what its own trial and
        the score will take. None where no time was asked for.
        """
        if self.effort_seconds is None:
            return None
        score = seconds_to_score(self.effort_seconds) if self.n_seq else 0.0
        return self.effort_seconds - spent - trial - score

    def at_least(self, factor: float = 1.0) -> dict[str, Any]:
        """Return the options of quantize for so many times these speeds, {} if none is asked."""
        both = {"min_speed": self.min_speed, "min_prompt_speed": self.min_prompt_speed}
        asked = {name: factor * least for name, least in both.items() if least}
        return {**asked, "speeds": self.speeds} if asked else {}


@dataclass(frozen=True)
class Picked:
    """The chosen file and the evidence for it; n_tried files were written."""

    path: Path
    plan: Plan
    frontier: Frontier
    trial: CheckResult
    score: EvalResult | None
    n_tried: int
    request: PickRequest

    def reasons(self) -> tuple[str, ...]:
        """Return the choice in five lines: memory, size, trial, speed, quality."""
        return (
            self._memory(),
            self._size(),
            self._trial(),
            self._speed(),
            self._quality(),
        )

    def _memory(self) -> str:
        use = self.trial.planned
        rest = use.total - use.weights
        return (
            f"memory: {format_bytes(self.trial.limit)} less {format_bytes(rest)} of cache, buffers "
            f"and overhead for {self.trial.n_ctx} tokens leave "
            f"{format_bytes(self.trial.limit - rest)} for weights"
        )

    def _size(self) -> str:
        frontier = self.frontier
        ends = f"{format_bytes(frontier.start_bytes)} to {format_bytes(frontier.end_bytes)}"
        plans = f"{format_count(len(frontier.steps) + 1, 'optimal plan')} from {ends}"
        is_beyond = self.plan.n_bytes > frontier.end_bytes
        which = f"beyond the {plans}" if is_beyond else f"the best of {plans} that fits"
        return (
            f"size: {format_bytes(self.plan.n_bytes)}, {self.plan.bpw:.2f} bpw, {which} (try "
            f"{self.n_tried})"
        )

    def _trial(self) -> str:
        trial = self.trial
        seconds = format_seconds(trial.load_seconds or 0.0)
        return (
            f"trial: loaded in {seconds}, {format_bytes(trial.peak_bytes or 0)} at its peak with "
            f"the context full, {format_bytes(trial.margin or 0)} to spare; no sign of collapse"
        )

    def _speed(self) -> str:
        speed = self.trial.speed
        if speed is None:
            return "speed: not measured"
        least, least_prompt = self.request.min_speed, self.request.min_prompt_speed
        asked = f", asked were {least:g}" if least else ""
        prompts = f"prompts {speed.prompt.median:.0f} tokens/s"
        prompts += f", asked were {least_prompt:g}" if least_prompt else ""
        found = speed.generation
        if found is None:
            return f"speed: {prompts}"
        return (
            f"speed: {found.median:.1f} tokens/s ({found.low:.1f}–{found.high:.1f}){asked}; "
            f"{prompts}"
        )

    def _quality(self) -> str:
        if self.score is None:
            return "quality: not scored"
        found = self.score
        own = sum(s.nll_sum for s in found.sequences)
        original = sum(s.reference_nll_sum or 0.0 for s in found.sequences)
        ratio = math.exp((own - original) / max(1, found.n_scored))
        return (
            f"quality: KLD {found.kld_mean:.4f} nats per token and {ratio:.3f} × the perplexity of "
            f"the original, on {format_count(len(found.sequences), 'sequence')} of "
            f"{self.request.n_ctx} tokens"
        )


def pick(
    model: Path,
    output: Path | None,
    request: PickRequest,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
    **options: Unpack[PlanOptions],
) -> Picked:
    """Return the best file that fits, is fast enough and passes its trial; it is then written.

    With a least speed, formats are chosen by their speed on this machine, as quantize does. A file
    that is too large when tried is made again with fewer bytes, one that is too slow with faster
    formats, at most four times. Raises BudgetError when none will do, with what was reached; the
    last one tried is left then.
    """
    start = clock()
    model, wanted = local_path(model), output
    measurement = measure(
        model, encoder=request.encoder, threads=threads, progress=progress,
        formats=options.get("formats"),
    )  # fmt: skip
    frontier = curve(measurement, **options)
    trial = request.trial
    memory = MemoryRequest(trial.shape, trial.limit.n_bytes, trial.limit.source)
    most: int | None = None
    factor = 1.0  # what a file is made for, of the speed that its trial shall find
    for n_tried in range(1, _MOST_ROUNDS + 1):
        announce(f"try {n_tried}")
        made = quantize(
            model, MemoryLimit(memory, most, model), output, measurement=measurement, effort="fast",
            force=force or n_tried > 1, threads=threads, progress=progress, announce=announce,
            **request.at_least(factor), **options,
        )  # fmt: skip
        plan, output = made.plan, made.paths[0]
        announce(f"{output}: {format_bytes(plan.n_bytes)}, {plan.bpw:.2f} bpw")
        tried_at = clock()
        found = check_file(output, trial, announce=announce)
        trial_seconds = clock() - tried_at
        fewer, slower = _smaller(found, plan), _slower(found, request)
        if fewer is None and slower is None:
            if request.effort != "fast":
                left = request.effort_seconds_left(clock() - start, trial_seconds)
                if left is None or left > 0:
                    plan, found = _improved(
                        model, output, plan, found, replace(request, effort_seconds=left),
                        options, threads, progress, announce,
                    )  # fmt: skip
                else:
                    announce(
                        f"the file by priors stays: finding its size took "
                        f"{format_seconds(clock() - start)}; give more with --time"
                    )
            if wanted is None:
                output = _renamed(output, model, plan, force=force)
                found = found.model_copy(update={"path": str(output)})
            score = _score(output, model, request, threads, progress)
            return Picked(output, plan, frontier, found, score, n_tried, request)
        most = most if fewer is None else fewer
        factor *= 1.0 if slower is None else slower * _MARGIN
    raise BudgetError(f"{output}: {_reached(found, request)} after {_MOST_ROUNDS} tries")


def _renamed(path: Path, model: Path, plan: Plan, *, force: bool) -> Path:
    """Give the file of the last try the default name of its plan; return its path."""
    if default_output(model, plan) == path:
        return path
    new = free_output(model, plan, force=force)
    put_in_place(path, new, force=force, error=GGUFError)
    return new


def _improved(
    model: Path,
    output: Path,
    plan: Plan,
    found: CheckResult,
    request: PickRequest,
    options: PlanOptions,
    threads: int | None,
    progress: Progress | None,
    announce: Callable[[str], None],
) -> tuple[Plan, CheckResult]:
    """Return the plan and trial of the file that the effort makes in as many bytes.

    Should that fail its trial or be too slow, the file by priors is written again, and stays.
    """
    try:
        made = quantize(
            model, plan.n_bytes, output, effort=request.effort, seconds=request.effort_seconds,
            force=True, threads=threads, progress=progress, announce=announce,
            **request.at_least(), **options,
        )  # fmt: skip
    except BudgetError as e:  # not fast enough; the file before it is untouched
        announce(f"the file of that effort is not taken: {e}")
        return plan, found
    tried = check_file(output, request.trial, announce=announce)
    if tried.passed and _smaller(tried, made.plan) is None and _slower(tried, request) is None:
        return made.plan, tried
    announce("the file of that effort fails its trial or is too slow: the one before it stays")
    quantize(model, output=output, from_plan=plan, force=True, threads=threads, progress=progress)
    return plan, found


def _smaller(found: CheckResult, plan: Plan) -> int | None:
    """Return how large the next try may be, None if this one fits and passes its trial."""
    if found.failed_stage in ("load", "fill"):
        return int(0.95 * plan.n_bytes)
    if found.margin is not None and found.margin < 0:
        return plan.n_bytes + found.margin
    if not found.passed:
        raise EngineError(
            f"{found.path} fails its trial: {'; '.join(found.failures)}; a smaller one will not do "
            "better: allow more memory, or a shorter context"
        )
    return None


def _slower(found: CheckResult, request: PickRequest) -> float | None:
    """Return by which factor a file that passes is too slow, None if it is fast enough."""
    if not (request.is_timed and found.passed) or found.speed is None:
        return None
    reached = ((request.min_speed, _tokens_per_second(found)),
               (request.min_prompt_speed, found.speed.prompt.median))  # fmt: skip
    factor = max(least / max(speed, 1e-9) for least, speed in reached)
    return None if factor <= 1 else factor


def _tokens_per_second(found: CheckResult) -> float:
    speed = found.speed.generation if found.speed else None
    return speed.median if speed else 0.0


def _reached(found: CheckResult, request: PickRequest) -> str:
    if found.speed is None or not found.passed:
        return "it does not fit its memory"
    both = (
        (request.min_speed, _tokens_per_second(found), "generation"),
        (request.min_prompt_speed, found.speed.prompt.median, "prompts"),
    )
    return ", ".join(
        f"{speed:.1f} tokens/s of {what} were reached, {least:g} asked for"
        for least, speed, what in both
        if least
    )


def _score(
    path: Path, model: Path, request: PickRequest, threads: int | None, progress: Progress | None
) -> EvalResult | None:
    if request.n_seq == 0:
        return None
    found = evaluate(
        [path], reference=model, n_ctx=request.n_ctx, n_seq=request.n_seq, threads=threads,
        progress=progress,
    )  # fmt: skip
    return found.results[0] if found.results else None
