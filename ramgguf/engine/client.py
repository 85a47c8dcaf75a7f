"""The parent's side of the engine: start the worker, ask, and say what happened when it dies."""

import collections
import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ramgguf.engine.child import PYTHON, STDERR_LINES
from ramgguf.engine.wire import (
    Answer,
    Failed,
    Open,
    Opened,
    ResponseAdapter,
    Score,
    Scored,
    Started,
    TokenIds,
    Tokenize,
    Tokenized,
    pack_ids,
    unpack_ids,
)
from ramgguf.errors import EngineError
from ramgguf.schema import _Value

A = TypeVar("A", bound=Answer)

_WORKER = (*PYTHON, "-m", "ramgguf.engine.worker")


class ModelError(EngineError):
    """llama.cpp refused a model, or crashed: which model, in which sequence (None: loading)."""

    def __init__(self, model: int, index: int | None, message: str) -> None:
        super().__init__(message)
        self.model = model
        self.index = index


class CrashError(ModelError):
    """The worker process ended by itself; code is its exit status, negative for a signal."""

    def __init__(self, model: int, index: int | None, message: str, code: int | None) -> None:
        super().__init__(model, index, message)
        self.code = code


class Engine:
    """Models loaded in a child process. Use as a context manager; leaving it ends the child.

    Raises ModelError when llama.cpp refuses a model, CrashError when it crashes.
    """

    def __init__(
        self,
        models: Sequence[Path],
        *,
        n_ctx: int,
        n_threads: int,
        safe_kernels: bool = False,
        verbose: bool = False,
    ) -> None:
        self._paths = tuple(models)
        self._safe_kernels = safe_kernels
        self._verbose = verbose
        self._at = Started(model=0, index=None)
        self._stderr: collections.deque[str] = collections.deque(maxlen=STDERR_LINES)
        self._process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self._drain = threading.Thread(target=self._read_stderr, daemon=True)
        self._drain.start()
        try:
            self.opened = self._ask_opened(n_ctx, n_threads)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.wait()
        self._drain.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unwritten requests have no reader any more
                    pipe.close()

    def ask(self, request: _Value, answer: type[A]) -> A:
        """Return the answer to a request; more answers to the same come from receive."""
        self._send(request)
        return self.receive(answer)

    def receive(self, answer: type[A]) -> A:
        """Return the next answer, which has to be of that type."""
        found = self._receive()
        if not isinstance(found, answer):
            raise _unexpected(found)
        return found

    def tokenize(
        self, text: str, *, add_special: bool, model: int = 0
    ) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        """Return the text's token ids and where each ends in its UTF-8 bytes."""
        found = self.ask(Tokenize(model=model, text=text, add_special=add_special), Tokenized)
        return unpack_ids(found.ids), unpack_ids(found.ends).astype(np.int64)

    def score(
        self, index: int, ids: TokenIds, first_target: int, *, has_reference: bool
    ) -> Iterator[Scored]:
        """Yield the scores of the sequence, one for each model, in the models' order."""
        request = Score(
            index=index, ids=pack_ids(ids), first_target=first_target, has_reference=has_reference
        )
        return self.answers(request)

    def answers(self, request: Score) -> Iterator[Scored]:
        """Yield the answers to a request for scores, one for each model."""
        self._send(request)
        for _ in self._paths:
            yield self.receive(Scored)

    def _ask_opened(self, n_ctx: int, n_threads: int) -> Opened:
        request = Open(
            models=tuple(str(p) for p in self._paths),
            n_ctx=n_ctx,
            n_threads=n_threads,
            safe_kernels=self._safe_kernels,
            verbose=self._verbose,
        )
        return self.ask(request, Opened)

    def _send(self, message: _Value) -> None:
        pipe = _pipe(self._process.stdin)
        try:
            pipe.write(message.model_dump_json() + "\n")
            pipe.flush()
        except OSError:
            raise self._died() from None

    def _receive(self) -> Answer:
        for line in _pipe(self._process.stdout):
            try:
                found = ResponseAdapter.validate_json(line)
            except ValidationError:
                break  # cut short by a crash in the middle of a line
            if isinstance(found, Failed):
                raise ModelError(self._at.model, self._at.index, found.message)
            if not isinstance(found, Started):
                return found
            self._at = found
        raise self._died()

    def _died(self) -> CrashError:
        self._process.kill()  # when only its pipe broke
        code = self._process.wait()
        self._drain.join()
        path, index = self._paths[self._at.model], self._at.index
        doing = "while loading" if index is None else f"in sequence {index}"
        said = "".join(f"\n  {line}" for line in self._stderr)
        hint = "; --safe-kernels avoids llama.cpp's repacked kernels"
        if self._safe_kernels or code == -signal.SIGBUS:
            hint = ""
        return CrashError(
            self._at.model,
            index,
            f"{path}: llama.cpp crashed {doing}: {_cause(code)}{hint}"
            + (f"; it said:{said}" if said else ""),
            code,
        )

    def _read_stderr(self) -> None:
        for line in _pipe(self._process.stderr):
            self._stderr.append(line.rstrip())
            if self._verbose:
                sys.stderr.write(line)


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # all three were asked for
    return pipe


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unknown signal"
    what = {
        "SIGSEGV": "a bad memory access",
        "SIGABRT": "a failed assertion",
        "SIGBUS": "was the file cut short, or did its disk fail, while it was in use?",
    }.get(name)
    return f"signal {-code} ({name}{', ' + what if what else ''})"


def _unexpected(found: _Value) -> EngineError:
    return EngineError(f"the engine answered {type(found).__name__}; this is a bug of ramgguf")
