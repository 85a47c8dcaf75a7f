"""Serving a file: with which settings, whether they fit, and the child process that does it."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter

from ramgguf.core.errors import BudgetError, EngineError, ResultError
from ramgguf.core.machine import Available
from ramgguf.core.units import format_bytes
from ramgguf.deploy.access import normal_host, normal_key, normal_origin
from ramgguf.deploy.collapse_checks import KNOWN_TEXT
from ramgguf.deploy.division_rooms import MemoryRequest
from ramgguf.deploy.footprint import FootprintEstimator
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.front import LOOPBACK, Front
from ramgguf.deploy.front_requests import Limits, prompt_bytes, request_bytes
from ramgguf.deploy.memory import CONTEXT_STEP, MemoryPlanner
from ramgguf.deploy.result import CheckResult
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.child import Child, ChildDiedError, Failure, describe_exit
from ramgguf.llama.server_protocol import ModelDied, Serve, Serving

_FRONT, _WORKER = "ramgguf.deploy.front", "ramgguf.llama.server"
_CHAT_WITHOUT_TEMPLATE = "chatml"
# What the processes beside the model's take, measured with Python 3.11 on Linux (proportional set
# sizes): the front 43 MB, 50 MB after large requests, and the one for templates 41 MB.
SERVER_BYTES = 100_000_000
_ANSWER: TypeAdapter[Any] = TypeAdapter(
    Annotated[Serving | ModelDied | Failure, Field(discriminator="kind")]
)
# How a process dies of a kernel: not by SIGKILL, which is the system's when memory is short.
_CRASHES = (signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)


@dataclass(frozen=True)
class Settings:
    """How a file is served, the bytes that it needs, and how these are known.

    needed is all of it: the model and its cache, the server's other processes, and request_bytes,
    which the model's process may take beyond what it has after loading. chat_format None is the
    file's own template. checked is the deployment test that they are from, n_ctx_train the context
    that the model was trained for, where the file tells.
    """

    path: Path
    alias: str
    shape: ContextShape
    n_threads: int
    chat_format: str | None
    needed: int
    needed_by: Literal["measured", "llama.cpp", "estimate"]
    checked: CheckResult | None = None
    n_ctx_train: int | None = None
    allow_grammars: bool = False

    @property
    def request_bytes(self) -> int:
        """What one request may take in the model's process."""
        return _room(self.shape, self.allow_grammars)


def _room(shape: ContextShape, allow_grammars: bool) -> int:
    return request_bytes(prompt_bytes(shape.n_ctx), allow_grammars=allow_grammars)


def planned_settings(
    path: Path,
    shape: ContextShape,
    limit: Available,
    *,
    n_threads: int,
    allow_grammars: bool = False,
    force: bool = False,
) -> Settings:
    """Return the settings for a context, planned to fit the limit.

    Raises GGUFError for a file that is none, BudgetError, unless forced, for one that does not fit.
    """
    shape = _whole(shape)
    with open_gguf(path, kind_check=True) as file:
        with FootprintEstimator(file) as scale:
            footprint = scale.footprint(shape, {})
        needed = footprint.use.total + SERVER_BYTES + _room(shape, allow_grammars)
        if needed > limit.n_bytes and not force:
            raise BudgetError(_too_large(file, shape, needed, limit, allow_grammars))
        made = _settings(file, path, shape, n_threads, needed, footprint.method)
        return replace(made, allow_grammars=allow_grammars)


def checked_settings(
    path: Path,
    result: CheckResult,
    limit: Available,
    *,
    allow_grammars: bool = False,
    force: bool = False,
) -> Settings:
    """Return the settings that a deployment test of the file was made with.

    Raises ResultError when it was of another file, or failed and is not forced, and BudgetError
    when what it took is more than the limit.
    """
    with open_gguf(path, kind_check=True) as file:
        if result.differs(file) is not None:
            raise ResultError(
                f"the check is of another file, {result.path} ({result.n_bytes:,} bytes), not "
                f"{path} ({file.n_bytes:,} bytes); run: ramgguf check {path} --json"
            )
        if result.failures and not force:
            raise ResultError(
                f"{path} failed its check: {'; '.join(result.failures)}; --force serves it anyway"
            )
        shape = _whole(ContextShape(result.n_ctx, 1, result.type_k, result.type_v))
        model_bytes = result.peak_bytes or result.planned.total
        needed = model_bytes + SERVER_BYTES + _room(shape, allow_grammars)
        if needed > limit.n_bytes and not force:
            raise BudgetError(_too_large(file, shape, needed, limit, allow_grammars))
        by: Literal["measured", "llama.cpp", "estimate"] = (
            "measured" if result.peak_bytes is not None else result.planned_by
        )
        made = _settings(file, path, shape, result.n_threads, needed, by, result)
        return replace(made, allow_grammars=allow_grammars)


def _whole(shape: ContextShape) -> ContextShape:
    """Return the shape with the context that llama.cpp makes of it."""
    return replace(shape, n_ctx=-(-shape.n_ctx // CONTEXT_STEP) * CONTEXT_STEP)


def _settings(
    file: GGUFFile,
    path: Path,
    shape: ContextShape,
    n_threads: int,
    needed: int,
    needed_by: Literal["measured", "llama.cpp", "estimate"],
    checked: CheckResult | None = None,
) -> Settings:
    has_template = file.metadata.string("tokenizer.chat_template") is not None
    return Settings(
        path=path,
        alias=path.name.removesuffix(".gguf"),
        shape=shape,
        n_threads=n_threads,
        chat_format=None if has_template else _CHAT_WITHOUT_TEMPLATE,
        needed=needed,
        needed_by=needed_by,
        checked=checked,
        n_ctx_train=file.metadata.integer(f"{file.architecture}.context_length"),
    )


def _too_large(
    file: GGUFFile, shape: ContextShape, needed: int, limit: Available, allow_grammars: bool
) -> str:
    """Return the line that says what does not fit, and what would."""

    def besides(n_ctx: int) -> int:
        return SERVER_BYTES + _room(replace(shape, n_ctx=n_ctx), allow_grammars)

    with MemoryPlanner(file, MemoryRequest(shape, limit.n_bytes)) as planner:
        longest = planner.longest_context(file.n_bytes, besides)
    would = f"the longest context that fits is {longest}: --context {longest}; " if longest else ""
    name = file.paths[0].name
    return (
        f"{name} with a context of {shape.n_ctx} tokens needs {format_bytes(needed)}, "
        f"more than {format_bytes(limit.n_bytes)} ({limit.source}); {would}"
        "ramgguf quantize --memory makes a file that fits; --force serves it anyway"
    )


@dataclass(frozen=True)
class Place:
    """Where a server listens, who may ask it, and with which kernels it computes.

    safe_kernels None means: without llama.cpp's repacked kernels if it crashes with them. hosts and
    origins are allowed besides the loopback's; max_tokens None is the context.

    Raises EngineError for a key, a host or an origin that no request can have.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    safe_kernels: bool | None = None
    verbose: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_tokens: int | None = None
    n_waiting: int = 16
    seconds: float = 600

    def __post_init__(self) -> None:
        if self.api_key is not None:
            object.__setattr__(self, "api_key", normal_key(self.api_key))
        object.__setattr__(self, "hosts", tuple(map(normal_host, self.hosts)))
        object.__setattr__(self, "origins", tuple(map(normal_origin, self.origins)))

    def limits(self, n_ctx: int, *, allow_grammars: bool = False) -> Limits:
        """Return what a request may take of a context."""
        any_host = self.host in ("", "0.0.0.0", "::")
        named = () if any_host else (f"[{self.host}]" if ":" in self.host else self.host,)
        return Limits(
            prompt_bytes=prompt_bytes(n_ctx),
            max_tokens=min(self.max_tokens or n_ctx, n_ctx),
            n_waiting=self.n_waiting,
            seconds=self.seconds,
            allow_grammars=allow_grammars,
            hosts=(*LOOPBACK, *named, *self.hosts),
            origins=self.origins,
        )


class Server:
    """A running server. Use as a context manager, which starts it; leaving it ends it.

    Raises EngineError when it cannot start; announce gets a line for what takes long or goes wrong.
    """

    def __init__(
        self,
        settings: Settings,
        place: Place,
        *,
        announce: Callable[[str], None] = lambda _: None,
        worker: str = _WORKER,
    ) -> None:
        self.settings, self.place = settings, place
        self.safe_kernels = bool(place.safe_kernels)
        self._announce, self._worker = announce, worker
        self._stops = 0

    def __enter__(self) -> Self:
        path = self.settings.path
        self._announce(f"{path.name}: loading")
        try:
            self._start()
        except ChildDiedError as e:
            if self.place.safe_kernels is not None or -e.code not in _CRASHES:
                raise
            self._announce(
                f"{path.name}: llama.cpp ended with {describe_exit(e.code)}; once more, "
                "without its repacked kernels"
            )
            self.safe_kernels = True
            self._start()
        return self

    def _start(self) -> None:
        self._child = Child(_FRONT, on_stderr=sys.stderr.write)
        request = Front(
            serve=self._request(),
            worker=self._worker,
            limits=self.place.limits(
                self.settings.shape.n_ctx, allow_grammars=self.settings.allow_grammars
            ),
        )
        try:
            self._child.send(request)
            line = self._child.receive()
            if not line:
                raise self._child.died()
            answer = _ANSWER.validate_json(line)
            if isinstance(answer, ModelDied):
                raise ChildDiedError(answer.code, ())
            if isinstance(answer, Failure):
                raise EngineError(answer.message)
            self.serving = answer
        except BaseException:
            self._child.__exit__(None, None, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, e, at)

    def _request(self) -> Serve:
        settings, place = self.settings, self.place
        return Serve(
            path=str(settings.path),
            alias=settings.alias,
            host=place.host,
            port=place.port,
            api_key=place.api_key,
            n_ctx=settings.shape.n_ctx,
            n_threads=settings.n_threads,
            type_k=settings.shape.type_k,
            type_v=settings.shape.type_v,
            chat_format=settings.chat_format,
            safe_kernels=self.safe_kernels,
            verbose=place.verbose,
            sample_text=KNOWN_TEXT,
            growth_bytes=settings.request_bytes,
        )

    @property
    def pid(self) -> int:
        """The serving process's id."""
        return self._child.pid

    @property
    def url(self) -> str:
        """Where an OpenAI client finds it from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.place.host, self.place.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.serving.port}/v1"

    def stop(self) -> None:
        """Have it end when what it is answering is done, or soon; a second time, at once."""
        self._stops += 1
        if self._stops == 1:
            self._child.hang_up()
        else:
            self._child.kill()

    def wait(self) -> None:
        """Wait for the requested end. Raises EngineError when the server ends by itself."""
        code = self._child.wait()
        if not self._stops:
            raise EngineError(f"the server ended with {describe_exit(code)}")
