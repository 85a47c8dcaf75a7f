"""A file that is fast enough: planned by the speed of formats, timed, and planned again if need be.

What is predicted leaves out attention, and adds up formats that were timed apart. So what was made
is timed, and where it is slower than predicted, or much faster than asked for, what is predicted is
corrected by as much and the file is made again.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ramgguf.core.errors import BudgetError, EngineError, PlanError
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_bytes
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.file_speed import time_file
from ramgguf.llama.format_speed import SpeedProfile, format_speeds
from ramgguf.llama.system import llama_installed
from ramgguf.plan import N_PROMPT, SpeedLimit, TokenWork
from ramgguf.plan.result import PlannedSpeed
from ramgguf.quantize.pipeline import Quantized
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml

MOST_FILES = 4
_FASTER = 1.05  # than asked for: from here on, formats could be better
_SHORT_PROMPT = 64  # tokens, where the speed of prompts does not matter
_MARGIN = 1.01

Make = Callable[[SpeedLimit], Quantized]


@dataclass(frozen=True)
class Reached:
    """Tokens per second: medians of what was measured, prompts if they matter."""

    generation: float | None
    prompt: float | None

    def __str__(self) -> str:
        both = ((self.generation, "generation"), (self.prompt, "prompts"))
        return " and ".join(f"{v:.3g} tokens/s of {what}" for v, what in both if v is not None)


def speed_limit(
    model: Path,
    generation: float,
    prompt: float,
    *,
    names: Iterable[str] | None,
    profile: SpeedProfile | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> SpeedLimit:
    """Return the limit of a model's speed on this machine; 0 is none.

    names are the formats to choose from, by default all; those that suit rows of the model and were
    never timed here are timed now, unless there is a profile. Raises PlanError for a speed that is
    no positive number, EngineError where llama.cpp is not installed.
    """
    for name, least in (("min_speed", generation), ("min_prompt_speed", prompt)):
        if not (math.isfinite(least) and least >= 0):
            raise PlanError(f"{name} is {least:g}; expected a positive number of tokens/s")
    if not llama_installed():
        raise EngineError("a least speed is measured: pip install 'ramgguf[eval]'")
    with open_gguf(model, kind_check=True) as file:
        work = TokenWork.of(file)
        matrices = [t for t in file.tensors if len(t.shape) > 1]
        own, rows = ({t.type_name for t in matrices}, {t.row_length for t in matrices})
    if profile is None:
        asked = formats.expand(names) if names is not None else _offered()
        suiting = {name for name in asked if any(formats.suits(name, n) for n in rows)}
        wanted = suiting | (own & formats.known())
        profile = format_speeds(wanted, threads=threads, progress=progress, announce=announce)
    return SpeedLimit(profile, work, generation, prompt)


def _offered() -> tuple[str, ...]:
    extra = formats.with_importance() if libggml.is_installed() else ()
    return (*formats.offered(), *extra)


def fast_enough(
    make: Make,
    limit: SpeedLimit,
    *,
    relaxes: bool = True,
    announce: Callable[[str], None] = lambda _: None,
) -> tuple[Quantized, SpeedLimit]:
    """Return what was made and measured to be fast enough, and the limit corrected by that.

    make writes the file for a limit, in place of the one before. One that is more than 5 % faster
    than asked for, because it was predicted to be slower, is made again, if relaxes. Raises
    BudgetError with what was reached when none of MOST_FILES is fast enough.
    """
    enough: SpeedLimit | None = None
    for left in reversed(range(MOST_FILES)):
        made = make(limit)
        planned = made.plan.speed
        assert planned is not None  # it was planned with a limit
        reached = measured(made.paths[0], limit)
        announce(f"{format_bytes(made.n_bytes)}: {reached} measured, {_asked(limit)} asked for")
        corrected = _corrected(limit, planned, reached)
        if _is_enough(reached, limit):
            if not (relaxes and enough is None and left and _is_loose(planned, reached, limit)):
                return _noted(made, reached), corrected
            enough = limit
        limit = enough if enough is not None and left == 1 else corrected
    raise BudgetError(
        f"{reached} were reached with the last of {MOST_FILES} files, {_asked(limit)} are asked "
        "for; ask for less, or allow other --formats"
    )


def measured(path: Path, limit: SpeedLimit) -> Reached:
    """Return how fast a file is, with as many threads as the formats were timed with.

    Raises EngineError for an embedding model that is asked to generate.
    """
    rates = time_file(
        path,
        threads=limit.profile.n_threads,
        n_prompt=N_PROMPT if limit.prompt else _SHORT_PROMPT,
    )
    if limit.generation and not rates.generation:
        raise EngineError(
            "the model embeds texts and generates nothing: give --min-prompt-speed, not --min-speed"
        )
    return Reached(
        statistics.median(rates.generation) if rates.generation else None,
        statistics.median(rates.prompt) if limit.prompt else None,
    )


def _asked(limit: SpeedLimit) -> str:
    return str(Reached(limit.generation or None, limit.prompt or None))


def _is_enough(reached: Reached, limit: SpeedLimit) -> bool:
    return (reached.generation or 0.0) >= limit.generation and (
        reached.prompt or 0.0
    ) >= limit.prompt


def _is_loose(planned: PlannedSpeed, reached: Reached, limit: SpeedLimit) -> bool:
    """Return whether a limit that the plan barely keeps to is exceeded by what was measured."""
    both = (
        (limit.generation, planned.generation, reached.generation or 0.0),
        (limit.prompt, planned.prompt, reached.prompt or 0.0),
    )
    binding = [(least, found) for least, expected, found in both if 0 < expected < _FASTER * least]
    return bool(binding) and all(found > _FASTER * least for least, found in binding)


def _corrected(limit: SpeedLimit, planned: PlannedSpeed, reached: Reached) -> SpeedLimit:
    """Return the limit with predictions as they should have been, and a little margin."""

    def factor(expected: float, found: float | None) -> float:
        return 1.0 if not found else _MARGIN * expected / found

    return limit.corrected(
        limit.slowdown * factor(planned.generation, reached.generation),
        limit.prompt_slowdown * factor(planned.prompt, reached.prompt),
    )


def _noted(made: Quantized, reached: Reached) -> Quantized:
    """Return what was made, its plan with the speed that was measured."""
    assert made.plan.speed is not None
    update: dict[str, object] = {"is_measured": True, "generation": reached.generation or 0.0}
    if reached.prompt is not None:
        update["prompt"] = reached.prompt
    speed = made.plan.speed.model_copy(update=update)
    return replace(made, plan=made.plan.model_copy(update={"speed": speed}))
