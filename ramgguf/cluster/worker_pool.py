"""The pool's side: hand tasks to an executor, take answers as they come, check who gave them."""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from ramgguf.cluster.dask_executor import DaskExecutor
from ramgguf.cluster.session_cache import SESSIONS
from ramgguf.cluster.tasks import (
    Done,
    EngineKey,
    EngineRequest,
    Failed,
    Key,
    RunnerRequest,
    Task,
    WorkerInfo,
)
from ramgguf.cluster.worker import perform
from ramgguf.core.errors import EngineError
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.llama.client import CrashError, ModelError, WrongKindError

MAX_TRIES = 3  # of a task whose child is killed from outside, by the system short of memory say


class PassCrashError(EngineError):
    """llama.cpp ended its process during a pass."""


class WorkerPool:
    """The workers of an executor, for one run. Use as a context manager.

    Leaving it closes what workers in this process keep open; those elsewhere close it after a
    while, or use it for the next run. Raises EngineError when workers are not of one kind.
    """

    def __init__(self, executor: Executor, *, is_here: bool = False) -> None:
        self._executor = DaskExecutor.instead_of(executor)
        self._is_here = is_here  # one thread of this process: who failed needs no name
        self._run = uuid.uuid4().hex
        self._workers: dict[str, WorkerInfo] = {}
        self._waiting: dict[Future[Done | Failed], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self._cancel()
        SESSIONS.close(self._run)

    @property
    def n_workers(self) -> int:
        """How many tasks run at the same time, where the executor tells; otherwise 1."""
        if isinstance(self._executor, DaskExecutor):
            return self._executor.n_workers
        return int(getattr(self._executor, "_max_workers", 1))

    @property
    def cpus(self) -> tuple[str, ...]:
        """The names of the CPUs that have computed so far, sorted."""
        return tuple(sorted({w.system.cpu for w in self._workers.values()}))

    def task(self, label: str, key: Key, request: RunnerRequest | EngineRequest) -> Task:
        """Return a task of this run."""
        return Task(label, key, request, self._run, __version__)

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """Yield positions in `tasks` and answers, as they come; the first failure ends it all.

        Leaving the iterator cancels what has not begun.
        """
        finished: SimpleQueue[Future[Done | Failed]] = SimpleQueue()
        tries: Counter[int] = Counter()

        def submit(position: int) -> None:
            tries[position] += 1
            future = self._executor.submit(perform, tasks[position])
            self._waiting[future] = position
            future.add_done_callback(finished.put)

        try:
            for position in range(len(tasks)):
                submit(position)
            while self._waiting:
                future = finished.get()
                position = self._waiting.pop(future)
                task = tasks[position]
                found = _outcome(future, task)
                if isinstance(found, Done):
                    self._take_note(found.worker)
                    yield position, found
                elif found.kind == "lost" and tries[position] < MAX_TRIES:
                    submit(position)
                else:
                    raise _error(found, task, tries[position], here=self._is_here)
        finally:
            self._cancel()

    def ask(self, task: Task) -> Done:
        """Return the answer to one task."""
        ((_, done),) = self.perform([task])
        return done

    def _cancel(self) -> None:
        """Drop what has not begun; what runs elsewhere ends with its pass."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting:
            future.cancel()

    def _take_note(self, worker: WorkerInfo) -> None:
        first = next(iter(self._workers.values()), worker)
        difference = worker.difference(first)
        if difference is not None:
            raise EngineError(
                f"workers compute differently: {difference}; their results must not be mixed: "
                "take workers of one kind"
            )
        self._workers[worker.name] = worker


def _outcome(future: Future[Done | Failed], task: Task) -> Done | Failed:
    """Return what a task came to. Raises EngineError when that is nothing."""
    try:
        return future.result()
    except CancelledError:
        raise EngineError(
            f"{task.label}: the executor dropped it; is its scheduler still there? "
            "What was finished is kept: run the command again"
        ) from None
    except BrokenExecutor as e:
        raise EngineError(
            f"{task.label}: a worker died, and its executor cannot go on without it ({e}). "
            "What was finished is kept: run the command again"
        ) from None
    except Exception as e:
        if type(e).__name__ == "KilledWorker":
            raise _killed(task, int(getattr(e, "allowed_failures", 0)) + 1) from None
        if isinstance(e, ImportError) or "deserializ" in str(e) or "Can't get attr" in str(e):
            raise EngineError(
                f"the executor cannot run ramgguf's tasks ({type(e).__name__}: {e}); "
                f"its workers, and Dask's scheduler, need ramgguf {__version__}"
            ) from None
        raise


def _killed(task: Task, n_workers: int) -> EngineError:
    message = f"{task.label}: {format_count(n_workers, 'worker')} died with it, one after the other"
    if isinstance(task.key, EngineKey) and len(task.key.models) <= 2:
        return CrashError(len(task.key.models) - 1, None, message, None)
    return EngineError(message)


def _error(failed: Failed, task: Task, n_tries: int, *, here: bool) -> EngineError:
    match failed.kind:
        case "error":
            where = "" if here else f"worker {failed.worker}: "
            return EngineError(f"{where}{failed.message}")
        case "refused" if failed.model_kind is not None:
            return WrongKindError(failed.model, failed.index, failed.message, failed.model_kind)
        case "refused":
            return ModelError(failed.model, failed.index, failed.message)
    message = failed.message
    if failed.kind == "lost":
        who = "processes" if here else "workers"
        last = "" if here else f", {failed.worker} the last"
        message = f"{message}; {n_tries} {who} lost it{last}"
    if isinstance(task.key, EngineKey):
        return CrashError(failed.model, failed.index, message, None)
    kind = PassCrashError if failed.kind == "crashed" else EngineError
    return kind(f"{task.label}: {message}")
