"""A child process with llama.cpp in it that answers requests: one JSON object per line each way.

llama.cpp can end its process, and a memory limit can, too: the parent lives on and says how.
"""

import collections
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TextIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError, RamggufError

STDERR_LINES = 12  # of the child's last words that an error repeats
_SECONDS_TO_LEAVE = 2.0  # after its stdin was closed; one that is still there is killed
# -P: a folder named ramgguf in the working directory must not be imported instead of this package.
PYTHON = (sys.executable, "-P")

_ENVIRONMENT = {
    # One thread: the default reserves memory for one on every CPU, and all of it counts.
    "OPENBLAS_NUM_THREADS": "1",
    # A failed assertion says what failed; with gdb installed it would add Python's frames to that.
    "GGML_NO_BACKTRACE": "1",
}

_CAUSES = {
    "SIGSEGV": "a bad memory access",
    "SIGABRT": "a failed assertion",
    "SIGBUS": "was the file cut short, or did its disk fail, while it was in use?",
}

Request = TypeVar("Request", bound=FrozenModel)
Response = TypeVar("Response", bound=FrozenModel)


class Failure(FrozenModel):
    """An error that has a message and no crash."""

    kind: Literal["failure"] = "failure"
    message: str


class ChildDiedError(EngineError):
    """The child process ended by itself; code is its exit status, negative for a signal."""

    def __init__(self, code: int, said: Sequence[str]) -> None:
        self.code = code
        self.said = tuple(said)
        super().__init__(f"llama.cpp ended with {describe_exit(code)}{quoted(said)}")


def quoted(said: Sequence[str]) -> str:
    """Return the last words of a child as the end of a message, on one line."""
    lines = [line.strip() for line in said if line.strip()]
    return f"; it said: {' | '.join(lines)}" if lines else ""


def describe_exit(code: int) -> str:
    """Return how a process ended, in words: exit status 1, signal SIGABRT (a failed assertion)."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
    return f"signal {name} ({_CAUSES[name]})" if name in _CAUSES else f"signal {name}"


class Child:
    """A running child. Use as a context manager; leaving it ends the child.

    A module's main is run, or a command, by the command `runner` if one is given (to limit it).
    on_stderr gets every line that it writes there.
    """

    def __init__(
        self,
        what: str | Sequence[str],
        *,
        runner: Sequence[str] = (),
        on_stderr: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._on_stderr = on_stderr
        self._said: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        if isinstance(what, str):
            what = (*PYTHON, "-c", f"from {what} import main; main()")
        self._process = subprocess.Popen(
            [*runner, *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is the parent's to handle
            env=os.environ | _ENVIRONMENT,
        )
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child: close its stdin, at which it leaves, and kill it if it does not."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_LEAVE)
        self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unwritten requests have no reader any more
                    pipe.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def said(self) -> tuple[str, ...]:
        """The last lines that the child wrote to stderr."""
        return tuple(self._said)

    def hang_up(self) -> None:
        """Close the child's stdin, at which it ends."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def wait(self) -> int:
        """Return how the child ended, once it has: its exit status, negative for a signal."""
        return self._process.wait()

    def kill(self) -> None:
        """End the child at once."""
        self._process.kill()

    def ask(self, request: FrozenModel, expected: type[Response]) -> Response:
        """Return the answer. Raises EngineError if it is a failure, ChildDiedError if none comes"""
        self.send(request)
        line = self.receive()
        with contextlib.suppress(ValidationError):
            raise EngineError(Failure.model_validate_json(line).message)
        try:
            return expected.model_validate_json(line)
        except ValidationError:  # nothing, or a line cut short
            raise self.died() from None

    def send(self, request: FrozenModel) -> None:
        """Write a request; raises ChildDiedError when nobody reads it."""
        assert self._process.stdin is not None  # asked for above
        try:
            self._process.stdin.write(request.model_dump_json() + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self.died() from None

    def receive(self) -> str:
        """Return the next line of an answer, empty when there is none any more."""
        assert self._process.stdout is not None  # asked for above
        return self._process.stdout.readline()

    def died(self) -> ChildDiedError:
        """Return how the child ended; one that lives but makes no sense is ended first."""
        self._process.kill()  # when only its pipe broke
        code = self._process.wait()
        self._drain.join()
        return ChildDiedError(code, self._said)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None  # asked for above
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            self._on_stderr(line)


def answer_requests(kind: TypeAdapter[Request], answer: Callable[[Request], FrozenModel]) -> None:
    """Answer requests on stdin until it ends; what llama.cpp prints to stdout goes to stderr."""
    out = take_stdout()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=queue_lines, args=(sys.stdin, lines), daemon=True).start()
    while True:
        request = kind.validate_json(lines.get())
        try:
            found: Any = answer(request)
        except RamggufError as e:
            found = Failure(message=str(e))
        except MemoryError:
            found = Failure(message="out of memory")
        out.write(found.model_dump_json() + "\n")
        out.flush()


def take_stdout() -> TextIO:
    """Return what stdout was, for answers; what is printed there from now on goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def queue_lines(source: TextIO, lines: "queue.SimpleQueue[str]") -> None:
    """Pass on the parent's lines; when there are no more, end this process at once."""
    for line in source:
        lines.put(line)
    os._exit(0)  # the parent is gone, and llama.cpp may be in the middle of a computation
