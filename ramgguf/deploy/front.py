"""The server's front: HTTP, limits and errors, in a process that has no llama.cpp in it.

It checks a request whole before a child sees it: Host and Origin, the key, sizes, types, ranges.
The model runs in a child; one that ends is started again, and the front goes on answering.
"""

import asyncio
import hmac
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.deploy.front_children import (
    Job,
    Model,
    RequestError,
    Templates,
    checked_grammar,
)
from ramgguf.deploy.front_replies import ChatReply, CompletionReply, Reply, as_event, error_body
from ramgguf.deploy.front_requests import (
    GRAMMAR_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Limits,
    TokenizeRequest,
)
from ramgguf.llama.child import ChildDiedError, Failure, take_stdout
from ramgguf.llama.server_protocol import (
    GRACE_SECONDS,
    CheckGrammar,
    Detokenize,
    Generate,
    ModelDied,
    Piece,
    Render,
    Serve,
    Serving,
    Tokenize,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_BODY_SECONDS = 30  # to receive a request's body
_CONNECTIONS = 256
_KEEP_ALIVE_SECONDS = 15

Body = TypeVar("Body", bound=BaseModel)


class Front(FrozenModel):
    """Serve the model that `worker` runs, within limits; answered by Serving when it listens."""

    serve: Serve
    worker: str
    limits: Limits


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, which does not listen yet; port 0 is any free one.

    Raises EngineError when it cannot be bound.
    """
    if not 0 <= port < 1 << 16:  # getaddrinfo takes it modulo that
        raise EngineError(f"port {port} is none; choose another --port, 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except OSError as e:
        raise EngineError(
            f"{host}:{port} cannot be listened at: {e}; choose another --host or --port"
        ) from None
    return found


def worded(error: ValidationError) -> str:
    """Return the first thing that is wrong with a request, where it is and why."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}"[:500] if where else message[:500]


async def read_body(request: Any, kind: type[Body], n_bytes: int) -> Body:
    """Return the request's body. Raises RequestError: 413, 408, or 400 with what is wrong."""
    too_large = RequestError(413, f"the request has more than {n_bytes} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > n_bytes:
        raise too_large
    parts, n_read = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                n_read += len(part)
                if n_read > n_bytes:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise RequestError(408, f"the request took longer than {_BODY_SECONDS} seconds") from None
    try:
        return kind.model_validate_json(b"".join(parts))
    except ValidationError as e:
        raise RequestError(400, worded(e)) from None


class Api:
    """The endpoints."""

    def __init__(self, front: Front, model: Model) -> None:
        self._alias, self._path = front.serve.alias, front.serve.path
        self._api_key = front.serve.api_key
        self._limits = front.limits
        self._model, self._templates = model, Templates(front.limits)
        self._grammar_turn = asyncio.Lock()
        self._n_admitted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def try_template(self) -> None:
        """Compile the file's template, or try the named format on one message.

        Raises EngineError for a template that cannot be compiled, a format that makes no prompt.
        """
        loaded = self._model.loaded
        assert loaded is not None  # the caller has loaded it
        try:
            await self._templates.start(loaded.chat)
            if loaded.chat.template is None:
                plain = Render(
                    messages=[{"role": "user", "content": "Hi"}],
                    tools=None,
                    tool_choice=None,
                    max_bytes=self._limits.prompt_bytes,
                )
                await self._templates.render(loaded.chat, plain)
        except RequestError as e:
            if loaded.chat.template is None:
                raise EngineError(
                    f"the chat format {loaded.chat.name} makes no prompt here ({e.message}); "
                    "choose another --chat-format"
                ) from None
            raise EngineError(
                f"{self._path}: llama.cpp cannot serve it ({e.message}); --chat-format chatml "
                "serves it without its chat template"
            ) from None

    def app(self) -> Any:
        """Return the ASGI application, behind Starlette's checks of hosts and origins."""
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route

        limits = self._limits
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(limits.hosts), www_redirect=False),
            Middleware(Origins, allowed=limits.origins),
        ]
        if limits.origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(limits.origins),
                    allow_methods=["GET", "POST"],
                    allow_headers=["Authorization", "Content-Type"],
                )
            )
        posts = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/extras/tokenize": self._tokenize,
            "/extras/tokenize/count": self._count,
            "/extras/detokenize": self._detokenize,
        }
        routes = [Route(path, self._guarded(do), methods=["POST"]) for path, do in posts.items()]
        routes.append(Route("/v1/models", self._guarded(self._models), methods=["GET"]))
        routes.append(Route("/health", self._health, methods=["GET"]))
        return Starlette(
            routes=routes, middleware=middleware, exception_handlers={404: _no_such, 405: _no_such}
        )

    def _guarded(self, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return the endpoint behind the key, with errors that are lines."""

        async def answer(request: Any) -> Any:
            try:
                self._require_key(request.headers.get("authorization", ""))
                return await endpoint(request)
            except RequestError as e:
                return _refusal(e)
            except EngineError as e:  # a child cannot be started: memory is short
                return _refusal(RequestError(503, f"{e}; try again"))

        return answer

    def _require_key(self, header: str) -> None:
        if self._api_key is None:
            return
        scheme, _, key = header.partition(" ")
        same = hmac.compare_digest(key.strip().encode(), self._api_key.encode())
        if scheme.lower() != "bearer" or not same:
            raise RequestError(401, "the API key is wrong or missing", "invalid_api_key")

    def _admit(self) -> None:
        """Count a request in. Raises RequestError when as many wait as may."""
        if self._n_admitted > self._limits.n_waiting:
            raise RequestError(
                429, f"too many requests wait ({self._limits.n_waiting} may); try again"
            )
        self._n_admitted += 1

    async def _health(self, _: Any) -> Any:
        from starlette.responses import JSONResponse

        ready = self._model.is_ready
        status = {"status": "ok" if ready else "loading"}
        return JSONResponse(status, status_code=200 if ready else 503)

    async def _models(self, _: Any) -> Any:
        model = {"id": self._alias, "object": "model", "owned_by": "me", "created": 0}
        return _json({"object": "list", "data": [model]})

    async def _completions(self, request: Any) -> Any:
        asked = await read_body(request, CompletionRequest, self._limits.body_bytes)
        self._require_short(asked.text)
        self._require_output(asked.max_tokens)
        reply = CompletionReply(self._alias, asked.text if asked.echo else "")
        return await self._admitted(request, asked, reply, lambda: self._plain(asked))

    async def _chat(self, request: Any) -> Any:
        asked = await read_body(request, ChatRequest, self._limits.body_bytes)
        self._require_output(asked.most_tokens)
        reply = ChatReply(self._alias)
        return await self._admitted(request, asked, reply, lambda: self._prompted(asked))

    async def _plain(self, asked: CompletionRequest) -> Generate:
        return await self._generate(asked, asked.text, asked.max_tokens, asked.stops)

    async def _prompted(self, asked: ChatRequest) -> Generate:
        loaded = self._model.loaded
        assert loaded is not None  # the front listens once it is
        render = Render(
            messages=[message.for_template() for message in asked.messages],
            tools=asked.tools,
            tool_choice=asked.tool_choice,
            max_bytes=self._limits.prompt_bytes,
        )
        rendered = await self._templates.render(loaded.chat, render)
        return await self._generate(
            asked,
            rendered.prompt,
            asked.most_tokens,
            asked.stops + rendered.stop,
            add_special=rendered.add_bos,
            schema=None if asked.response_format is None else asked.response_format.schema_or_none,
        )

    async def _generate(
        self,
        asked: Generation,
        prompt: str,
        max_tokens: int | None,
        stop: tuple[str, ...],
        *,
        add_special: bool | None = None,
        schema: Any = None,
    ) -> Generate:
        grammar = None
        if asked.grammar is not None or schema is not None:
            grammar = await self._checked(asked.grammar, schema)
        return Generate(
            id=self._model.next_id(),
            prompt=prompt,
            add_special=add_special,
            max_tokens=self._limits.max_tokens if max_tokens is None else max_tokens,
            stop=stop,
            grammar=grammar,
            sampling=asked.sampling(),
        )

    async def _checked(self, grammar: str | None, schema: Any) -> str:
        if not self._limits.allow_grammars:
            raise RequestError(
                400, "grammars and JSON schemas are off; the server's --allow-grammars allows them"
            )
        if grammar is not None and schema is not None:
            raise RequestError(400, "grammar and response_format exclude each other")
        text = None if schema is None else json.dumps(schema)
        check = CheckGrammar(
            path=self._path, grammar=grammar, schema_text=text, growth_bytes=GRAMMAR_BYTES
        )
        async with self._grammar_turn:  # each takes the memory of a vocabulary, and a limit's
            return await checked_grammar(check, self._limits)

    def _require_short(self, text: str) -> None:
        n_bytes = len(text.encode("utf-8", "replace"))
        if n_bytes > self._limits.prompt_bytes:
            raise RequestError(
                400, f"the text has {n_bytes} bytes, more than {self._limits.prompt_bytes}"
            )

    def _require_output(self, max_tokens: int | None) -> None:
        if max_tokens is not None and max_tokens > self._limits.max_tokens:
            raise RequestError(
                400, f"max_tokens is {max_tokens}, more than {self._limits.max_tokens}"
            )

    async def _admitted(
        self,
        request: Any,
        asked: Generation,
        reply: Reply,
        prepare: Callable[[], Any],
    ) -> Any:
        """Answer a request for text, whole or as a stream, if there is room for it."""
        from starlette.responses import StreamingResponse

        self._admit()
        job: Job | None = None
        streams = False
        try:
            job = await _unless_gone(request, self._submitted(prepare))
            if not asked.stream:
                return _json(await _unless_gone(request, _whole(job, reply)))
            first = await job.next()  # an error is an answer of its own status, not a stream
            self._spawn(self._free_at_end(job))
            streams = True
            return StreamingResponse(
                self._stream(job, first, reply, asked.with_usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        finally:
            if not streams:
                self._leave(job)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free_at_end(self, job: Job) -> None:
        """Free a stream's place when its job has ended: its client may never read the rest."""
        await job.ended.wait()
        self._n_admitted -= 1

    async def _submitted(self, prepare: Callable[[], Any]) -> Job:
        return await self._model.submit(await prepare())

    def _leave(self, job: Job | None) -> None:
        self._n_admitted -= 1
        if job is not None:
            job.abandon()

    async def _stream(
        self, job: Job, first: Any, reply: Reply, with_usage: bool
    ) -> AsyncIterator[str]:
        """Yield the events of a stream; what goes wrong is one, too."""
        try:
            for event in reply.opening():
                yield as_event(event)
            answer = first
            while isinstance(answer, Piece):
                yield as_event(reply.piece(answer.text))
                answer = await job.next()
            yield as_event(reply.last(answer))
            if with_usage:
                yield as_event(reply.usage_event(answer))
            yield "data: [DONE]\n\n"
        except RequestError as e:
            yield as_event(error_body(e.message, e.status, e.code))
        finally:
            job.abandon()

    async def _ask(self, request: Any, message: Tokenize | Detokenize) -> Any:
        self._admit()
        job: Job | None = None
        try:
            job = await _unless_gone(request, self._model.submit(message))
            return await job.next()
        finally:
            self._leave(job)

    async def _tokens(self, request: Any) -> tuple[int, ...]:
        asked = await read_body(request, TokenizeRequest, self._limits.body_bytes)
        self._require_short(asked.input)
        answer = await self._ask(request, Tokenize(id=self._model.next_id(), text=asked.input))
        found: tuple[int, ...] = answer.tokens
        return found

    async def _tokenize(self, request: Any) -> Any:
        return _json({"tokens": await self._tokens(request)})

    async def _count(self, request: Any) -> Any:
        return _json({"count": len(await self._tokens(request))})

    async def _detokenize(self, request: Any) -> Any:
        asked = await read_body(request, DetokenizeRequest, self._limits.body_bytes)
        if len(asked.tokens) > self._limits.prompt_bytes:
            raise RequestError(400, f"there are more than {self._limits.prompt_bytes} tokens")
        message = Detokenize(id=self._model.next_id(), tokens=tuple(asked.tokens))
        return _json({"text": (await self._ask(request, message)).text})


class Origins:
    """Refuses what a page of another origin sends: a browser sends it before it asks by CORS."""

    def __init__(self, app: Any, allowed: tuple[str, ...]) -> None:
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        origins = [v for k, v in scope.get("headers", ()) if k == b"origin"]
        if scope["type"] == "http" and not all(self._is_allowed(v) for v in origins):
            refusal = RequestError(403, "this origin may not ask; --allow-origin allows it")
            await _refusal(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, value: bytes) -> bool:
        origin = value.decode("latin-1")
        try:
            host = urlsplit(origin).hostname
        except ValueError:
            return False
        return "*" in self._allowed or origin in self._allowed or host in LOOPBACK


async def _whole(job: Job, reply: Reply) -> dict[str, Any]:
    pieces = []
    async for answer in job.rest():
        if isinstance(answer, Piece):
            pieces.append(answer.text)
    return reply.whole("".join(pieces), answer)


async def _unless_gone(request: Any, work: Any) -> Any:
    """Return what the work returns; when the client goes away first, cancel it."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RequestError(499, "the client went away")
        return working.result()
    finally:
        gone.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
        if not working.cancelled() and working.exception() is None:
            late = working.result()
            if isinstance(late, Job) and sys.exc_info()[0] is not None:
                late.abandon()


async def _gone(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: dict[str, Any]) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content)


def _refusal(error: RequestError) -> Any:
    from starlette.responses import JSONResponse

    body = error_body(error.message, error.status, error.code)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    if error.status in (408, 413):  # what is left of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(body, status_code=error.status, headers=headers)


async def _no_such(request: Any, error: Any) -> Any:
    what = f"{request.method} {request.url.path}"[:200].encode("ascii", "replace").decode()
    return _refusal(RequestError(error.status_code, f"{what} is no endpoint of this server"))


async def serve(front: Front, say: Callable[[BaseModel], None]) -> None:
    """Bind, load the model, serve until stdin ends. Raises EngineError, ChildDiedError."""
    started = time.perf_counter()
    try:
        import_module("starlette.applications")
        import uvicorn
    except ImportError as e:
        raise EngineError(
            f"the server's packages cannot be imported ({e}); pip install 'ramgguf[server]'"
        ) from None
    listener = bind(front.serve.host, front.serve.port)
    servers: list[Any] = []
    loop = asyncio.get_running_loop()

    def end() -> None:
        while sys.stdin.readline():
            pass
        if servers:
            loop.call_soon_threadsafe(setattr, servers[0], "should_exit", True)
            time.sleep(GRACE_SECONDS + 2)
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
    model = Model(front.worker, front.serve, front.limits)
    loaded = await model.start()
    api = Api(front, model)
    await api.try_template()

    class Server(uvicorn.Server):  # type: ignore[misc]  # uvicorn is not typed for us
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            seconds = time.perf_counter() - started
            port = listener.getsockname()[1]
            say(Serving(port=port, seconds=seconds, system=loaded.system))

        def install_signal_handlers(self) -> None:
            """The command has them; this process ends with its stdin."""

    config = uvicorn.Config(
        api.app(),
        lifespan="off",
        log_level="info" if front.serve.verbose else "error",
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
        ws="none",
        proxy_headers=False,
    )
    servers.append(Server(config))
    await servers[0].serve(sockets=[listener])


def main() -> None:
    """Serve what the first line of stdin asks for, until stdin ends."""
    out = take_stdout()
    front = Front.model_validate_json(sys.stdin.readline())

    def say(message: BaseModel) -> None:
        out.write(message.model_dump_json() + "\n")
        out.flush()

    try:
        asyncio.run(serve(front, say))
    except ChildDiedError as e:
        say(ModelDied(code=e.code))
    except (EngineError, MemoryError) as e:
        say(Failure(message=str(e) or "out of memory"))
    sys.stderr.flush()
    os._exit(0)  # children end with their stdin


if __name__ == "__main__":
    main()
