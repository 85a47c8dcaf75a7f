"""The children of the server's front: the model, which is restarted when it ends, and templates.

Each speaks JSON lines with its parent. None opens a socket, and each ends with its parent.
"""

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from ramgguf.core.errors import EngineError
from ramgguf.core.units import format_count
from ramgguf.deploy.front_requests import Limits
from ramgguf.llama.child import PYTHON, ChildDiedError, Failure, describe_exit
from ramgguf.llama.server_protocol import (
    GRACE_SECONDS,
    Answer,
    Cancel,
    ChatFormat,
    CheckedGrammar,
    CheckGrammar,
    Detokenize,
    Generate,
    Loaded,
    Piece,
    Refused,
    Render,
    Rendered,
    Serve,
    Tokenize,
)

_CHAT, _GRAMMAR = "ramgguf.llama.chat", "ramgguf.llama.grammar"
_START_SECONDS = 60  # for a Python that only imports, on a busy machine
_EXIT_SECONDS = 5  # for a process whose pipe has ended
_LONGEST_PAUSE = 30.0  # seconds between attempts to load a model that ended while loading
_LINE_BYTES = 1 << 30  # a prompt has its own limit; a line is no place to enforce one
_ANSWER: TypeAdapter[Any] = TypeAdapter(Answer)
_LOADED: TypeAdapter[Any] = TypeAdapter(Loaded | Failure)


class RequestError(Exception):
    """The answer to a client's mistake: an HTTP status and one line."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code
        super().__init__(message)


class _Process:
    """A child that reads and writes lines."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, module: str) -> "_Process":
        """Start a module's main. Raises EngineError when the system cannot, for want of memory."""
        try:
            return cls(
                await asyncio.create_subprocess_exec(
                    *PYTHON, "-c", f"from {module} import main; main()",
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the command
                    limit=_LINE_BYTES,
                    env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
                )
            )  # fmt: skip
        except (OSError, MemoryError) as e:
            raise EngineError(f"{module} cannot be started ({str(e) or 'out of memory'})") from None

    async def send(self, message: BaseModel) -> None:
        """Write a line; a child that is gone is noticed by who reads."""
        assert self._process.stdin is not None  # asked for above
        with contextlib.suppress(OSError):
            self._process.stdin.write(message.model_dump_json().encode() + b"\n")
            await self._process.stdin.drain()

    async def receive(self) -> bytes:
        """Return the next line, empty at the end."""
        assert self._process.stdout is not None  # asked for above
        line = await self._process.stdout.readline()
        return line if line.endswith(b"\n") else b""

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def reap(self) -> int:
        """Return how it ended; one that only closed its pipe is ended.

        kill comes second: it polls, which takes the exit status from asyncio (it says 255 then).
        """
        try:
            async with asyncio.timeout(_EXIT_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()


class Job:
    """A request that the model answers; its answers come in order, the last ends them."""

    def __init__(self, model: "Model", message: Generate | Tokenize | Detokenize) -> None:
        self._model, self.message = model, message
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        self.ended = asyncio.Event()

    async def next(self) -> Any:
        """Return the next answer. Raises RequestError when the request has failed."""
        answer = await self.answers.get()
        if isinstance(answer, RequestError):
            raise answer
        if isinstance(answer, Refused):
            raise RequestError(500 if answer.is_fault else 400, answer.message, answer.code)
        return answer

    async def rest(self) -> AsyncIterator[Any]:
        """Yield all answers until the last."""
        answer = await self.next()
        while isinstance(answer, Piece):
            yield answer
            answer = await self.next()
        yield answer

    def abandon(self) -> None:
        """Have the model stop: nobody reads the answers any more."""
        if not self.ended.is_set():
            self._model.cancel(self)


class Model:
    """The process that runs the model, one request at a time, and is started again when it ends."""

    def __init__(self, worker: str, serve: Serve, limits: Limits) -> None:
        self._worker, self._serve, self._limits = worker, serve, limits
        self._ids = itertools.count()
        self._turn = asyncio.Lock()
        self._job: Job | None = None
        self._process: _Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.loaded: Loaded | None = None

    async def start(self) -> Loaded:
        """Load the model. Raises EngineError, and ChildDiedError when its process ends."""
        process = await _Process.start(self._worker)
        try:
            await process.send(self._serve)
            line = await process.receive()
            answer = _LOADED.validate_json(line) if line else None
        except ValidationError:
            process.kill()
            raise EngineError("the model's process answers with what is no message") from None
        except BaseException:
            process.kill()
            raise
        if answer is None:
            raise ChildDiedError(await process.reap(), ())
        if isinstance(answer, Failure):
            raise EngineError(answer.message)
        self._process, self.loaded = process, answer
        self._spawn(self._read(process))
        return self.loaded

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, process: _Process) -> None:
        """Hand answers to the request that waits for them; when the process ends, start another.

        One whose answers are no messages is ended.
        """
        while line := await process.receive():
            try:
                answer = _ANSWER.validate_json(line)
            except ValidationError:
                process.kill()
                break
            if self._job is not None and answer.id == self._job.message.id:
                self._job.answers.put_nowait(answer)
                if not isinstance(answer, Piece):
                    self._job.ended.set()
        self._process = None
        how = describe_exit(await process.reap())
        print(f"the model's process ended with {how}; loading it again", file=sys.stderr)
        self._fail(RequestError(503, f"the model's process ended with {how}; it is loaded again"))
        await self._restart()

    def _fail(self, error: RequestError) -> None:
        if self._job is not None and not self._job.ended.is_set():
            self._job.answers.put_nowait(error)
            self._job.ended.set()

    async def _restart(self) -> None:
        pause = 0.5
        while True:
            try:
                await self.start()
            except (EngineError, OSError, MemoryError) as e:
                print(f"the model cannot be loaded: {e}", file=sys.stderr)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""
        return self._process is not None

    def next_id(self) -> int:
        """Return a number that no other request has."""
        return next(self._ids)

    async def submit(self, message: Generate | Tokenize | Detokenize) -> Job:
        """Return the request's job once it is its turn; raises RequestError if that never comes."""
        self._require()
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._turn.acquire()
        except TimeoutError:
            raise RequestError(
                503,
                f"others were answered for {format_count(self._limits.seconds, 'second', 'g')}; "
                "try again",
            ) from None
        job = Job(self, message)
        try:
            process = self._require()
            self._job = job
        except BaseException:
            self._turn.release()
            raise
        # A task of its own: a client that goes away must not take the model's turn with it.
        self._spawn(self._follow(job, process))
        return job

    def _require(self) -> _Process:
        if self._process is None:
            raise RequestError(503, "the model is being loaded again; try again soon")
        return self._process

    async def _follow(self, job: Job, process: _Process) -> None:
        """Send a request; when its time is over, have the model stop, or end its process."""
        seconds = self._limits.seconds
        try:
            await process.send(job.message)
            try:
                async with asyncio.timeout(seconds):
                    await job.ended.wait()
            except TimeoutError:
                job.answers.put_nowait(
                    RequestError(
                        503, f"the answer took longer than {format_count(seconds, 'second', 'g')}"
                    )
                )
                await process.send(Cancel(id=job.message.id))
                try:
                    async with asyncio.timeout(GRACE_SECONDS):
                        await job.ended.wait()
                except TimeoutError:
                    process.kill()
                    await process.reap()
        finally:
            job.ended.set()
            self._job = None
            self._turn.release()

    def cancel(self, job: Job) -> None:
        """Have the model stop answering a job."""
        if self._process is not None:
            self._spawn(self._process.send(Cancel(id=job.message.id)))


class Templates:
    """The process that makes prompts of chats; it is replaced when a template takes too long."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._process: _Process | None = None

    async def _started(self, chat: ChatFormat) -> _Process:
        process = await _Process.start(_CHAT)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await process.send(chat)
                line = await process.receive()
        except BaseException as e:
            process.kill()
            if isinstance(e, TimeoutError):
                raise RequestError(503, "the process for chat templates does not start") from None
            raise
        if not line or (error := json.loads(line).get("error")):
            process.kill()
            raise RequestError(500, error if line else "the chat template cannot be compiled")
        return process

    async def start(self, chat: ChatFormat) -> None:
        """Start the process. Raises RequestError where the template cannot be compiled."""
        async with self._turn:
            self._process = await self._started(chat)

    async def render(self, chat: ChatFormat, request: Render) -> Rendered:
        """Return the prompt of a chat. Raises RequestError where the template makes none."""
        seconds = self._limits.template_seconds
        async with self._turn:
            if self._process is None:
                self._process = await self._started(chat)
            process, done = self._process, False
            try:
                async with asyncio.timeout(seconds):
                    await process.send(request)
                    line = await process.receive()
                done = bool(line)
            except TimeoutError:
                raise RequestError(
                    400,
                    f"the chat template took longer than {format_count(seconds, 'second', 'g')}",
                ) from None
            finally:
                if not done:  # also when the client went away: its answer must not be the next's
                    process.kill()
                    self._process = None
        if not line:
            raise RequestError(400, "the chat template ended the process that tried it")
        rendered = Rendered.model_validate_json(line)
        if rendered.error is not None:
            raise RequestError(400, rendered.error)
        return rendered


async def checked_grammar(request: CheckGrammar, limits: Limits) -> str:
    """Return the grammar that llama.cpp can use. Raises RequestError for one that it cannot."""
    process, begun = await _Process.start(_GRAMMAR), False
    try:
        async with asyncio.timeout(_START_SECONDS) as deadline:
            await process.send(request)
            if line := await process.receive():
                begun = True
                deadline.reschedule(asyncio.get_running_loop().time() + limits.grammar_seconds)
                line = await process.receive()
        if not line:
            how = describe_exit(await process.reap())
            raise RequestError(400, f"llama.cpp ended with {how} when it parsed the grammar")
    except TimeoutError:
        if not begun:
            raise RequestError(503, "the process for grammars does not start") from None
        raise RequestError(
            400,
            f"the grammar took longer than {format_count(limits.grammar_seconds, 'second', 'g')} "
            "to parse",
        ) from None
    finally:
        process.kill()
    checked = CheckedGrammar.model_validate_json(line)
    if checked.error is not None:
        raise RequestError(400, checked.error)
    return checked.grammar
