"""What a worker keeps open between tasks: child processes with models, one for each task at work.

A tool serves one task at a time. Opening another one closes those that lie idle, so that a worker
with one thread never holds two; one that lay idle for half an hour is closed, too.
"""

import atexit
import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ramgguf.cluster.tasks import (
    Answer,
    EngineKey,
    EngineRequest,
    Key,
    OpenEngine,
    RunnerKey,
    RunnerRequest,
)
from ramgguf.core.errors import EngineError
from ramgguf.gguf.identity import same_file
from ramgguf.llama.child import Child
from ramgguf.llama.client import Engine
from ramgguf.llama.protocol import (
    Detokenize,
    Detokenized,
    Score,
    SystemInfo,
    Tokenize,
    Tokenized,
)
from ramgguf.llama.runner_protocol import (
    AboutRunner,
    Compare,
    Compared,
    DrawIds,
    DrawnIds,
    OpenRunner,
    Prepare,
    Prepared,
    RunnerOpened,
)

IDLE_SECONDS = 1800.0  # a copy of a large model takes long to make
_RUNNER_WORKER = "ramgguf.llama.runner_worker"


class Tool(Protocol):
    """A child process that answers requests."""

    system: SystemInfo

    def perform(self, request: RunnerRequest | EngineRequest) -> Answer: ...
    def close(self) -> None: ...


class RunnerTool:
    """A local runner in a child process."""

    def __init__(self, key: RunnerKey) -> None:
        same_file(key.model).close()
        self._child = Child(_RUNNER_WORKER)
        opening = OpenRunner(
            path=key.model.path,
            n_ctx=key.n_ctx,
            n_threads=key.n_threads,
            encoder=key.encoder,
            imatrix=key.imatrix,
            folder=key.folder,
            stand_in=key.stand_in,
        )
        try:
            self.system = self._child.ask(opening, RunnerOpened).system
        except BaseException:
            self.close()
            raise

    def perform(self, request: RunnerRequest | EngineRequest) -> Answer:
        """Return the child's answer."""
        match request:
            case AboutRunner():
                return self._child.ask(request, RunnerOpened)
            case DrawIds():
                return self._child.ask(request, DrawnIds)
            case Prepare():
                return self._child.ask(request, Prepared)
            case Compare():
                return self._child.ask(request, Compared)
        raise EngineError(f"a runner cannot {type(request).__name__}; this is a bug of ramgguf")

    def close(self) -> None:
        """End the child; its copy of the model goes with it."""
        self._child.close()


class EngineTool:
    """Models loaded by an engine."""

    def __init__(self, key: EngineKey) -> None:
        for model in key.models:
            same_file(model).close()
        self._engine = Engine(
            [Path(model.path) for model in key.models],
            n_ctx=key.options.n_ctx,
            n_threads=key.options.n_threads,
            safe_kernels=key.options.safe_kernels,
            verbose=key.options.verbose,
        )
        self.system = self._engine.opened.system

    def perform(self, request: RunnerRequest | EngineRequest) -> Answer:
        """Return the engine's answer."""
        match request:
            case OpenEngine():
                return self._engine.opened
            case Tokenize():
                return self._engine.ask(request, Tokenized)
            case Detokenize():
                return self._engine.ask(request, Detokenized)
            case Score():
                return tuple(self._engine.answers(request))
        raise EngineError(f"an engine cannot {type(request).__name__}; this is a bug of ramgguf")

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


class _Kept:
    def __init__(self, key: Key, run: str) -> None:
        self.key, self.run = key, run
        self.tool: Tool | None = None  # until it is open
        self.over = False

    def close(self) -> None:
        """Close the session, if it is open."""
        if self.tool is not None:
            self.tool.close()


class SessionCache:
    """The open sessions of this process."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin without sessions: a forked process leaves them to its parent."""
        self._lock = threading.Lock()
        self._idle: list[_Kept] = []
        self._busy: list[_Kept] = []
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def use(self, key: Key, run: str) -> Iterator[Tool]:
        """Yield a tool that no other task uses; one that fails is closed."""
        kept = self._take(key, run)
        try:
            if kept.tool is None:
                kept.tool = RunnerTool(key) if isinstance(key, RunnerKey) else EngineTool(key)
            if kept.over:
                raise EngineError("the run is over")
            yield kept.tool
        except BaseException:
            self._drop(kept)
            raise
        self._give_back(kept)

    def close(self, run: str | None = None) -> None:
        """Close the sessions that a run used last, busy or not; without a run, all of them."""
        with self._lock:
            ending = [k for k in (*self._idle, *self._busy) if run in (None, k.run)]
            self._idle = [k for k in self._idle if k not in ending]
            for kept in ending:
                kept.over = True  # a busy session, or one being opened, is not handed out
        for kept in ending:
            kept.close()

    def _take(self, key: Key, run: str) -> _Kept:
        with self._lock:
            fitting = next((k for k in self._idle if k.key == key), None)
            others = [] if fitting else self._idle
            self._idle = [k for k in self._idle if k is not fitting] if fitting else []
            kept = fitting or _Kept(key, run)
            kept.run = run
            self._busy.append(kept)
        for other in others:
            other.close()
        return kept

    def _drop(self, kept: _Kept) -> None:
        with self._lock:
            self._busy.remove(kept)
        kept.close()

    def _give_back(self, kept: _Kept) -> None:
        with self._lock:
            self._busy.remove(kept)
            if kept.over:
                return  # the caller that reports this has closed it
            self._idle.append(kept)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(IDLE_SECONDS, self._close_idle)
            self._timer.daemon = True
            self._timer.start()

    def _close_idle(self) -> None:
        with self._lock:
            ending, self._idle = self._idle, []
        for kept in ending:
            kept.close()


SESSIONS = SessionCache()
atexit.register(SESSIONS.close)
os.register_at_fork(after_in_child=SESSIONS.forget)
