"""Which tokens a refinement runs on, and what that will cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ramgguf.core.units import format_count, format_seconds
from ramgguf.llama.forward import ForwardRunner
from ramgguf.llama.sources import dataset_name, draw, draw_sets
from ramgguf.llama.tokens import TokenRequest
from ramgguf.plan.result import Plan
from ramgguf.refine.journal import RefineSettings

# Sensitivities are measured on sequences 0, 1, …: these are others, even with the same seed.
FIRST_SEQUENCE = 1000


@dataclass(frozen=True)
class Refining:
    """What is wanted: trials, and the number of sequences to propose, accept and report on."""

    n_trials: int
    request: TokenRequest
    sizes: tuple[int, int, int] = (2, 2, 4)


def settle(
    plan: Plan, wanted: Refining, passes: ForwardRunner, announce: Callable[[str], None]
) -> RefineSettings:
    """Return the tokens; announces, before most are drawn, what they and the trials will cost."""
    start = time.perf_counter()
    first = draw(passes, wanted.request, range(FIRST_SEQUENCE, FIRST_SEQUENCE + 1))
    drawing = time.perf_counter() - start
    each = passes.seconds(first[0])
    proposing, accepting, reporting = wanted.sizes
    least = drawing * sum(wanted.sizes) + each * (
        wanted.n_trials * proposing + 3 * sum(wanted.sizes)
    )
    most = least + each * wanted.n_trials * accepting
    promise = (
        f"{format_count(wanted.n_trials, 'swap')} to try, proposed on "
        f"{format_count(proposing, 'sequence')} of {wanted.request.n_ctx} tokens "
        f"({_told(wanted.request)}), accepted on {accepting} others, reported on {reporting} more: "
        f"{format_seconds(least)} to {format_seconds(most)}"
    )
    announce(promise)
    sets = draw_sets(passes, wanted.request, wanted.sizes, FIRST_SEQUENCE)
    return RefineSettings(
        plan_sha256=plan.sha256(),
        sample_sha256=plan.source.sample_sha256,
        budget=plan.budget,
        tokens=_told(wanted.request),
        seed=wanted.request.seed,
        ids=tuple(tuple(tuple(ids.tolist()) for ids in part) for part in sets),
        fingerprint=passes.prepare([ids for part in sets for ids in part]),
        promise=promise,
    )


def same(settings: RefineSettings, plan: Plan, wanted: Refining) -> bool:
    """Return whether they were settled for this plan and these wishes."""
    sizes = tuple(len(part) for part in settings.ids)
    asked = (_told(wanted.request), wanted.request.seed, wanted.sizes)
    same_plan = (settings.plan_sha256, settings.budget) == (plan.sha256(), plan.budget)
    sample = plan.source.sample_sha256
    same_plan = same_plan and (sample is None or settings.sample_sha256 in (None, sample))
    return same_plan and (settings.tokens, settings.seed, sizes) == asked


def _told(request: TokenRequest) -> str:
    return dataset_name(request.sources) if request.sources else request.tokens
