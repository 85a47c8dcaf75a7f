"""The deployment test: a file is loaded under its memory limit, filled, timed and asked."""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ramgguf.core.errors import EngineError
from ramgguf.core.machine import Available, memory_limit
from ramgguf.core.parallel import default_threads
from ramgguf.core.units import format_bytes, format_count
from ramgguf.core.version import __version__
from ramgguf.deploy.collapse_checks import (
    KNOWN_TEXT,
    PROMPTS,
    WORST_KNOWN_PPL,
    WORST_SURPRISE,
    perplexity,
    signs,
)
from ramgguf.deploy.division_rooms import MemoryRequest
from ramgguf.deploy.footprint import Footprint, FootprintEstimator, parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.memory import MemoryPlanner
from ramgguf.deploy.result import Answer, CheckResult, Speed, Spread, Stage
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.child import Child, ChildDiedError, describe_exit
from ramgguf.llama.kind import KindError, ModelKind
from ramgguf.llama.limits import Limiter, limiter
from ramgguf.llama.protocol import SystemInfo
from ramgguf.llama.trial_protocol import (
    Asked,
    Conversation,
    Fill,
    Filled,
    Load,
    Loaded,
    Rates,
    Scored,
    ScoreText,
    Talk,
    Time,
)

_WORKER = "ramgguf.llama.trial"
Announce = Callable[[str], None]


@dataclass(frozen=True)
class CheckRequest:
    """How a file is tried: its limit, its context, and how much is timed and said."""

    shape: ContextShape
    limit: Available
    n_threads: int
    n_repeats: int = 5
    n_prompt: int = 512
    n_generated: int = 32
    n_said: int = 96
    temperature: float = 0.8
    seed: int = 42


@dataclass
class _Found:
    """What a trial has found so far."""

    stage: Stage = "load"
    kind: ModelKind = "causal"
    n_ctx: int | None = None
    load_seconds: float | None = None
    peak_bytes: int | None = None
    filled: Filled | None = None
    rates: Rates | None = None
    asked: tuple[Asked, ...] = ()
    known_ppl: float | None = None
    system: SystemInfo | None = None
    failures: list[str] = field(default_factory=list)
    is_out_of_memory: bool = False  # llama.cpp or the system said so


def check_file(
    path: Path,
    request: CheckRequest,
    *,
    reference: Path | None = None,
    announce: Announce = lambda _: None,
) -> CheckResult:
    """Return what a deployment test of the file finds; it fails without raising.

    With a reference (the model it was made from), the answers are also judged by it. Both may be
    on the hub (hf://…). Of an embedding model, prompts are timed and nothing is generated. Raises
    GGUFError for a file that is none, EngineError when llama.cpp is missing, KindError for a model
    that gives neither tokens nor embeddings.
    """
    path = local_path(path)
    reference = None if reference is None else local_path(reference)
    with open_gguf(path, kind_check=True) as file:
        with FootprintEstimator(file) as scale:
            planned = scale.footprint(request.shape, {})
        found = _Found()
        limits = limiter(request.limit.n_bytes)
        _try(path, request, limits, found, announce)
        if reference is not None and found.kind == "embedding":
            raise EngineError(
                f"{path} is an embedding model and says nothing for --reference to judge; "
                "`ramgguf eval FILE --reference ORIGINAL` compares embeddings"
            )
        surprises = _judged(reference, request, found, announce)
        failures = [*found.failures, *_failures(planned, request, found, surprises)]
        return CheckResult(
            ramgguf_version=__version__,
            path=str(path),
            n_bytes=file.n_bytes,
            header_sha256=file.header_sha256,
            sample_sha256=file.sample_sha256,
            name=file.name,
            model_kind=found.kind,
            n_ctx=found.n_ctx or request.shape.n_ctx,
            type_k=request.shape.type_k,
            type_v=request.shape.type_v,
            n_threads=request.n_threads,
            limit=max(1, request.limit.n_bytes),
            limit_source=request.limit.source,
            limit_method=limits.method,
            planned=planned.use,
            planned_by=planned.method,
            system=found.system,
            load_seconds=found.load_seconds,
            peak_bytes=found.peak_bytes,
            speed=_speed(found),
            answers=_answers(found, surprises),
            known_ppl=found.known_ppl,
            reference=None if reference is None else str(reference),
            failed_stage=found.stage if found.failures else None,
            failures=tuple(failures),
            advice=_advice(file, request) if _is_memory(planned, request, found) else (),
        )


def _try(
    path: Path, request: CheckRequest, limits: Limiter, found: _Found, announce: Announce
) -> None:
    """Go through the stages in a fresh process; what ends it early is a failure."""
    shape = request.shape
    load = Load(
        path=str(path),
        n_ctx=shape.n_ctx,
        n_threads=request.n_threads,
        type_k=shape.type_k,
        type_v=shape.type_v,
        limit=limits.rlimit,
    )
    with Child(_WORKER, runner=limits.runner) as child:
        try:
            announce(f"{path.name}: loading under {format_bytes(request.limit.n_bytes)}")
            loaded = child.ask(load, Loaded)
            found.load_seconds, found.system = loaded.seconds, loaded.system
            found.kind, found.n_ctx = loaded.kind_of_model, loaded.n_ctx
            if found.kind not in ("causal", "embedding"):
                raise KindError(path, found.kind)
            announce(f"{path.name}: filling {loaded.n_ctx} tokens of context")
            found.stage = "fill"
            n_generated = max(1, min(request.n_generated, shape.n_ctx // 2))
            found.filled = child.ask(Fill(text=KNOWN_TEXT, n_generated=n_generated), Filled)
            found.peak_bytes = found.filled.peak_bytes
            announce(f"{path.name}: timing {format_count(request.n_repeats, 'repeat')}")
            found.stage = "time"
            timing = Time(
                text=KNOWN_TEXT,
                n_prompt=request.n_prompt,
                n_generated=n_generated,
                n_repeats=request.n_repeats,
            )
            found.rates = child.ask(timing, Rates)
            if found.kind == "embedding":
                return
            announce(f"{path.name}: asking {len(PROMPTS)} questions")
            found.stage = "talk"
            found.asked = child.ask(_talk(request), Conversation).answers
            found.stage = "score"
            known = child.ask(ScoreText(text=KNOWN_TEXT), Scored)
            found.known_ppl = min(1e300, perplexity(known.nll, known.n_tokens))
        except ChildDiedError as e:
            last = f" ({e.said[-1]})" if e.said else ""
            found.failures.append(
                f"{_DOING[found.stage]}: llama.cpp ended with {describe_exit(e.code)}{last}"
            )
            found.is_out_of_memory = e.code == -signal.SIGKILL or _tells_of_memory(e.said)
        except KindError:
            raise
        except EngineError as e:
            if "pip install" in str(e):
                raise
            found.failures.append(f"{_DOING[found.stage]}: {e}")
            found.is_out_of_memory = _tells_of_memory((str(e), *child.said))


_DOING = {
    "load": "loading it under the limit failed",
    "fill": "filling the context under the limit failed",
    "time": "timing it failed",
    "talk": "asking it failed",
    "score": "scoring the known text failed",
}


# What ggml, the C++ runtime and Python say when an allocation fails.
_MEMORY_WORDS = (
    *("out of memory", "insufficient memory", "bad_alloc", "alloc", "MemoryError"),
    "the process alone takes",  # llama/limits.py
)


def _tells_of_memory(said: Sequence[str]) -> bool:
    return any(word in line for line in said for word in _MEMORY_WORDS)


def _talk(request: CheckRequest) -> Talk:
    return Talk(
        prompts=PROMPTS,
        n_tokens=request.n_said,
        temperature=request.temperature,
        seed=request.seed,
    )


def _judged(
    reference: Path | None, request: CheckRequest, found: _Found, announce: Announce
) -> tuple[float, ...]:
    """Return for each answer how much more the reference is surprised by it than by its own."""
    if reference is None or not found.asked:
        return ()
    announce(f"{reference.name}: reading the answers")
    load = Load(
        path=str(reference), n_ctx=request.shape.n_ctx, n_threads=request.n_threads, mapped=True
    )
    with Child(_WORKER) as child:
        child.ask(load, Loaded)
        own = child.ask(_talk(request), Conversation).answers
        usual = [_surprise(child, a) for a in own]
        return tuple(_surprise(child, a) - sum(usual) / len(usual) for a in found.asked)


def _surprise(child: Child, answer: Asked) -> float:
    """Return the nats per token at which the child's model finds an answer."""
    ids, first = (*answer.prompt_ids, *answer.ids), len(answer.prompt_ids)
    scored = child.ask(ScoreText(ids=ids, first=first), Scored)
    return 99.0 if scored.nll is None else scored.nll / max(1, scored.n_tokens)


def _failures(
    planned: Footprint, request: CheckRequest, found: _Found, surprises: tuple[float, ...]
) -> list[str]:
    """Return why a trial that came to its end fails all the same."""
    failures, limit = [], request.limit.n_bytes
    buffers = planned.use.total - planned.use.overhead
    if found.peak_bytes is not None and found.peak_bytes > limit:
        failures.append(f"its peak of {format_bytes(found.peak_bytes)} is above the limit")
    elif planned.method == "llama.cpp" and buffers > limit and not found.failures:
        failures.append(f"weights, cache and buffers sum up to {format_bytes(buffers)}, too much")
    wrecks = [a for a in found.asked if signs(a)]
    if len(wrecks) * 2 > len(found.asked):
        kinds = "; ".join(sorted({sign for a in wrecks for sign in signs(a)}))
        failures.append(f"{len(wrecks)} of {len(found.asked)} answers are no text: {kinds}")
    if found.known_ppl is not None and found.known_ppl > WORST_KNOWN_PPL:
        failures.append(
            f"it babbles: a plain paragraph has a perplexity of {found.known_ppl:,.0f}, "
            f"above {WORST_KNOWN_PPL:.0f}"
        )
    if surprises and (worst := sum(surprises) / len(surprises)) > WORST_SURPRISE:
        failures.append(
            f"the reference finds its answers less likely than its own, by {worst:.1f} nats per "
            f"token, above {WORST_SURPRISE:g}"
        )
    return failures


def _is_memory(planned: Footprint, request: CheckRequest, found: _Found) -> bool:
    """Return whether the file failed for memory; a crash of another kind needs other advice."""
    limit = request.limit.n_bytes
    if found.peak_bytes is not None:
        return found.is_out_of_memory or found.peak_bytes > limit
    too_large = planned.use.total - planned.use.overhead > limit
    return found.is_out_of_memory or (bool(found.failures) and too_large)


def _speed(found: _Found) -> Speed | None:
    if found.rates is None or found.filled is None:
        return None
    if not (found.asked or found.kind == "embedding"):
        return None
    return Speed(
        n_prompt=found.rates.n_prompt,
        prompt=Spread.of(found.rates.prompt),
        generation=Spread.of(found.rates.generation) if found.rates.generation else None,
        first_token_seconds=Spread.of([a.first_seconds for a in found.asked])
        if found.asked
        else None,
        filling=found.filled.n_tokens / found.filled.seconds,
        generation_full=found.filled.generation,
    )


def _answers(found: _Found, surprises: tuple[float, ...]) -> tuple[Answer, ...]:
    return tuple(
        Answer(
            prompt=a.prompt,
            text=bytes.fromhex(a.text_hex).decode("utf-8", "replace"),
            n_tokens=len(a.ids),
            ended=a.ended,
            signs=signs(a),
            surprise=surprises[i] if surprises else None,
        )
        for i, a in enumerate(found.asked)
    )


def _advice(file: GGUFFile, request: CheckRequest) -> tuple[str, ...]:
    """Return what would make the file fit."""
    shape, limit = request.shape, request.limit.n_bytes
    memory = MemoryRequest(shape, limit)
    advice = []
    with MemoryPlanner(file, memory) as planner:
        longest = planner.longest_context(file.n_bytes)
    if 0 < longest < shape.n_ctx:
        advice.append(f"a context of at most {longest} tokens: --context {longest}")
    if shape.type_k in ("F16", "F32", "BF16"):
        with FootprintEstimator(file) as scale:
            smaller = scale.footprint(
                ContextShape(shape.n_ctx, shape.n_seq, "Q8_0", "Q8_0"), {}
            ).use
        fits = ", which fits" if smaller.total <= limit else ""
        advice.append(
            f"a smaller cache: --cache-type q8_0 needs {format_bytes(smaller.total)}{fits}"
        )
    advice.append(
        "a smaller file: ramgguf quantize ORIGINAL "
        f"--memory {limit} --context {shape.n_ctx} makes one that fits"
    )
    return tuple(advice)


def check(
    model: str | Path,
    memory: str | None = None,
    context: int = 4096,
    *,
    cache_type: str = "f16",
    reference: str | Path | None = None,
    repeats: int = 5,
    threads: int | None = None,
) -> CheckResult:
    """Return what a deployment test of the file finds: passed, or failures and advice.

    It is tried in a process of its own, under memory (16GB; None: what is left here) and with that
    many tokens of context really filled. With a reference, that model judges what it says. Raises
    GGUFError for a file that is none, EngineError when llama.cpp is missing.
    """
    request = CheckRequest(
        ContextShape(context, 1, *parse_cache_types(cache_type)),
        memory_limit(memory),
        n_threads=threads or default_threads(),
        n_repeats=repeats,
    )
    judge = None if reference is None else local_path(reference)
    return check_file(local_path(model), request, reference=judge)
