"""The front by itself: what it refuses and how it answers, without a process or a socket."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from ramgguf.core.errors import EngineError
from ramgguf.deploy import front as fronts
from ramgguf.deploy import front_children as children
from ramgguf.deploy.front import Api, Front, bind
from ramgguf.deploy.front_children import Job, Model, RequestError, Templates
from ramgguf.deploy.front_replies import error_body
from ramgguf.deploy.front_requests import (
    GRAMMAR_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Limits,
    prompt_bytes,
    request_bytes,
)
from ramgguf.llama.server_protocol import (
    ChatFormat,
    CheckGrammar,
    Detokenize,
    Finished,
    Generate,
    Piece,
    Refused,
    Render,
    Rendered,
    Serve,
    Text,
    Tokenize,
    Tokens,
)
from serve_requests import many_wrong

pytest.importorskip("starlette")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SERVE = Serve(
    path="m.gguf", alias="m", host="h", port=0, api_key=None, n_ctx=256, n_threads=1, type_k="F16",
    type_v="F16", chat_format=None, safe_kernels=False, verbose=False, sample_text="x",
    growth_bytes=1,
)  # fmt: skip
LIMITS = Limits(prompt_bytes=100, max_tokens=50, hosts=("localhost",))
FORMAT = ChatFormat(name="chatml", template=None, bos_token="", eos_token="", eos_id=-1)

Answers = Callable[[Any], Sequence[Any]]


def two_pieces(message: Any) -> Sequence[Any]:
    """Answer as the model's process does."""
    if isinstance(message, Tokenize):
        return [Tokens(id=message.id, tokens=(1, 2, 3))]
    if isinstance(message, Detokenize):
        return [Text(id=message.id, text="abc")]
    done = Finished(id=message.id, reason="stop", n_prompt=3, n_completion=2)
    return [Piece(id=message.id, text="a"), Piece(id=message.id, text="b"), done]


class StubModel:
    """In the place of the model's process: it answers at once."""

    def __init__(self, answers: Answers) -> None:
        self._answers, self.asked, self.is_ready = answers, list[Any](), True
        self.loaded = SimpleNamespace(chat=FORMAT)

    def next_id(self) -> int:
        return len(self.asked)

    def cancel(self, job: Job) -> None: ...

    async def submit(self, message: Any) -> Job:
        self.asked.append(message)
        job = Job(self, message)  # type: ignore[arg-type]  # a stub, as far as a job asks
        for answer in self._answers(message):
            job.answers.put_nowait(answer)
        job.ended.set()
        return job


class Fronted:
    """An application, asked without a server."""

    def __init__(
        self, limits: Limits = LIMITS, answers: Answers = two_pieces, key: str | None = None
    ) -> None:
        self.model = StubModel(answers)
        serve = SERVE.model_copy(update={"api_key": key})
        self.api = Api(Front(serve=serve, worker="w", limits=limits), self.model)  # type: ignore[arg-type]  # the stub
        self._app = self.api.app()

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, str, dict[str, str]]:
        """Return status, body and headers of the answer."""
        return asyncio.run(self._answer(*self.request(path, body, method, headers)))

    def request(
        self,
        path: str,
        body: Any,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[Any, bytes]:
        """Return a request's scope and body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"host": "localhost", "content-length": str(len(data))} | (headers or {})
        scope = {
            "type": "http", "method": method or ("GET" if body is None else "POST"), "path": path,
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in told.items()],
            "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("h", 1),
        }  # fmt: skip
        return scope, data

    async def _answer(self, scope: Any, data: bytes) -> tuple[int, str, dict[str, str]]:
        sent = list[dict[str, Any]]()

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.respond(scope, data, send)
        headers = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode(), headers

    async def respond(self, scope: Any, data: bytes, send: Any) -> None:
        """Have the application answer; send gets its messages."""
        parts = [data[:7], data[7:]]

        async def receive() -> dict[str, Any]:
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await asyncio.sleep(3600)
            raise AssertionError("nobody waits for so long")

        await self._app(scope, receive, send)

    def line(self, path: str, body: Any, status: int = 400, **options: Any) -> str:
        """Return the error's line."""
        found, text, _ = self.ask(path, body, **options)
        assert found == status, text
        message: str = json.loads(text)["error"]["message"]
        assert "\n" not in message
        return message


def chat(**options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}]} | options


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[Render]:
    """Templates that answer without a process; the requests that they got."""
    found: list[Render] = []

    async def render(_: Any, __: ChatFormat, request: Render) -> Rendered:
        found.append(request)
        return Rendered(prompt="<hi>", stop=("<end>",), add_bos=True)

    monkeypatch.setattr(Templates, "render", render)
    return found


def test_a_completion_has_openais_form_whole_and_as_a_stream() -> None:
    front = Fronted()
    status, text, _ = front.ask(COMPLETIONS, {"prompt": "x", "echo": True, "stop": "q"})
    answer = json.loads(text)
    assert (status, answer["object"], answer["model"]) == (200, "text_completion", "m")
    assert answer["choices"][0]["text"] == "xab"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    asked = front.model.asked[0]
    assert isinstance(asked, Generate)
    assert (asked.prompt, asked.max_tokens, asked.stop) == ("x", 16, ("q",))
    options = {"stream": True, "stream_options": {"include_usage": True}, "echo": True}
    _, text, headers = front.ask(COMPLETIONS, {"prompt": ["x"]} | options)
    assert headers["cache-control"] == "no-store"
    *events, done = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
    assert done == "[DONE]"
    made = [json.loads(event) for event in events]
    assert [c["text"] for e in made for c in e["choices"]] == ["x", "a", "b", ""]
    assert made[-2]["choices"][0]["finish_reason"] == "stop"
    assert made[-1]["usage"]["total_tokens"] == 5


def test_a_chat_is_rendered_then_generated(rendered: list[Render]) -> None:
    front = Fronted()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_completion_tokens": 7}
    _, text, _ = front.ask(CHAT, body | {"stop": ["s"], "user": "ignored"})
    message = json.loads(text)["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "ab"}
    assert rendered[0].messages == [{"role": "user", "content": "a\nb"}]
    asked = front.model.asked[0]
    assert (asked.prompt, asked.max_tokens, asked.stop) == ("<hi>", 7, ("s", "<end>"))
    assert asked.add_special is True
    _, text, _ = front.ask(CHAT, body | {"stream": True})
    first = json.loads(text.partition("\n\n")[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    assert text.endswith('"delta": {}, "logprobs": null, "finish_reason": "stop"}]}\n\n'
                         "data: [DONE]\n\n")  # fmt: skip


def test_tokens_and_texts_are_asked_of_the_model() -> None:
    front = Fronted()
    assert json.loads(front.ask("/extras/tokenize", {"input": "x"})[1]) == {"tokens": [1, 2, 3]}
    assert json.loads(front.ask("/extras/tokenize/count", {"input": "x"})[1]) == {"count": 3}
    assert json.loads(front.ask("/extras/detokenize", {"tokens": [1]})[1]) == {"text": "abc"}
    assert json.loads(front.ask("/v1/models")[1])["data"][0]["id"] == "m"


def test_health_tells_whether_the_model_is_loaded() -> None:
    front = Fronted()
    assert front.ask("/health")[:2] == (200, '{"status":"ok"}')
    front.model.is_ready = False
    assert front.ask("/health")[:2] == (503, '{"status":"loading"}')


def _schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COMPLETIONS, {"prompt": "é" * 51}, "the text has 102 bytes, more than 100"),
        (COMPLETIONS, {"max_tokens": 51}, "max_tokens is 51, more than 50"),
        (CHAT, chat(max_tokens=51), "max_tokens is 51, more than 50"),
        (CHAT, chat(max_completion_tokens=51), "max_tokens is 51, more than 50"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        (CHAT, chat(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
        (CHAT, chat(max_completion_tokens=0), "max_completion_tokens: Input should be greater"),
        (CHAT, chat(response_format=_schema(None)), "json_schema.schema must be an object"),
        (CHAT, chat(response_format=_schema(True)), "json_schema.schema must be an object"),
        (CHAT, chat(response_format={"type": "text", "schema": {}}), "type text has no schema"),
        (CHAT, chat(max_tokens=1, max_completion_tokens=1), "exclude each other"),
        (CHAT, chat(top_logprobs=3), "logprobs is not supported"),
        (COMPLETIONS, {"logprobs": 1}, "logprobs is not supported"),
        (COMPLETIONS, {"grammar": "root ::= x"}, "--allow-grammars"),
        (COMPLETIONS, {"top_k": -1}, "top_k: Input should be greater than"),
        (COMPLETIONS, {"no_such": 1}, "no_such: Extra inputs are not permitted"),
        (COMPLETIONS, b"{", "Invalid JSON"),
        ("/extras/tokenize", {"input": "x" * 101}, "101 bytes, more than 100"),
        ("/extras/detokenize", {"tokens": [1] * 101}, "more than 100 tokens"),
        ("/extras/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
)
def test_what_is_out_of_range_never_reaches_the_model(path: str, body: Any, said: str) -> None:
    front = Fronted()
    assert said in front.line(path, body)
    assert front.model.asked == []


REQUESTS: dict[str, type[BaseModel]] = {
    CHAT: ChatRequest, COMPLETIONS: CompletionRequest, "/extras/detokenize": DetokenizeRequest,
}  # fmt: skip


@pytest.mark.parametrize(("path", "body"), many_wrong(1 << 20))
def test_the_first_of_many_wrong_elements_ends_the_validation(path: str, body: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        REQUESTS[path].model_validate_json(body)
    assert caught.value.error_count() <= 4  # of a union, one for each member


@pytest.mark.parametrize("request_type", REQUESTS.values())
def test_every_list_of_a_request_ends_at_its_first_error(request_type: type[BaseModel]) -> None:
    def lists(schema: Any) -> Iterator[Any]:
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                yield schema
            for key, value in schema.items():
                if key != "definitions":  # that of any JSON, where nothing is wrong
                    yield from lists(value)
        elif isinstance(schema, list | tuple):
            for value in schema:
                yield from lists(value)

    found = list(lists(request_type.__pydantic_core_schema__))
    assert found
    assert all(schema.get("fail_fast") for schema in found)


def test_a_json_schema_needs_the_permission_too(rendered: list[Render]) -> None:
    told = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    assert "--allow-grammars" in Fronted().line(CHAT, chat(response_format=told))
    assert Fronted().ask(CHAT, chat(response_format={"type": "text"}))[0] == 200
    assert len(rendered) == 2


def test_an_allowed_grammar_is_tried_before_the_model_gets_it(
    monkeypatch: pytest.MonkeyPatch, rendered: list[Render]
) -> None:
    checks: list[CheckGrammar] = []

    async def checked(request: CheckGrammar, _: Limits) -> str:
        checks.append(request)
        if request.grammar == "bad":
            raise RequestError(400, "llama.cpp cannot parse the grammar")
        return request.grammar or "made of the schema"

    monkeypatch.setattr(fronts, "checked_grammar", checked)
    front = Fronted(LIMITS.model_copy(update={"allow_grammars": True}))
    assert "cannot parse" in front.line(COMPLETIONS, {"grammar": "bad"})
    assert front.model.asked == []
    assert front.ask(COMPLETIONS, {"grammar": "good"})[0] == 200
    told = {"type": "json_object", "schema": {"type": "array"}}
    assert front.ask(CHAT, chat(response_format=told))[0] == 200
    assert [m.grammar for m in front.model.asked] == ["good", "made of the schema"]
    assert checks[2].schema_text == '{"type": "array"}'
    assert checks[2].growth_bytes == GRAMMAR_BYTES
    assert "exclude each other" in front.line(CHAT, chat(response_format=told, grammar="good"))


def test_a_body_is_refused_by_what_it_declares_and_by_what_it_is() -> None:
    front = Fronted()
    most = LIMITS.body_bytes
    assert f"more than {most} bytes" in front.line(COMPLETIONS, {"prompt": "x" * most}, 413)
    for declared in (str(most + 1), "9" * 400, "-1", "x"):
        headers = {"content-length": declared}
        status, _, told = front.ask(COMPLETIONS, {}, headers=headers)
        assert (status, told["connection"]) == (413, "close")
    assert "more than" in front.line(
        COMPLETIONS, {"prompt": "x" * most}, 413, headers={"content-length": "5"}
    )


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", ""])
def test_hosts_that_are_not_named_are_refused(host: str) -> None:
    assert Fronted().ask("/v1/models", headers={"host": host})[0] == 400


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403), ("null", 403), ("http://[", 403), ("", 403),
        ("http://localhost.evil.example", 403), ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200), ("http://[::1]:80", 200), ("https://page.example", 200),
    ],
)  # fmt: skip
def test_origins_are_the_loopback_and_those_that_are_named(origin: str, status: int) -> None:
    front = Fronted(LIMITS.model_copy(update={"origins": ("https://page.example",)}))
    found, _, headers = front.ask("/v1/models", headers={"origin": origin})
    assert found == status
    allowed = headers.get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://page.example" else None)
    everyone = Fronted(LIMITS.model_copy(update={"origins": ("*",)}))
    if origin != "http://[":
        assert everyone.ask("/v1/models", headers={"origin": origin})[0] == 200


def test_the_key_is_asked_for_before_the_body_is_read() -> None:
    front = Fronted(key="k")
    for header in ("", "Bearer x", "Basic k", "Bearer", "Bearer \xff"):
        headers = {"authorization": header}
        assert "API key" in front.line(COMPLETIONS, b"{", 401, headers=headers)
    assert front.ask("/v1/models", headers={"authorization": "bearer  k "})[0] == 200


def test_what_is_no_endpoint_and_a_wrong_method_are_lines() -> None:
    assert "GET /nowhere is no endpoint" in Fronted().line("/nowhere", None, 404)
    assert "DELETE /v1/models" in Fronted().line("/v1/models", None, 405, method="DELETE")


@pytest.mark.parametrize("is_fault", [False, True])
def test_what_the_model_refuses_is_an_answer_of_its_own_status(is_fault: bool) -> None:
    def refuse(message: Any) -> Sequence[Any]:
        return [Refused(id=message.id, message="no\nway", code="c", is_fault=is_fault)]

    front = Fronted(answers=refuse)
    for stream in (False, True):
        status, text, _ = front.ask(COMPLETIONS, {"stream": stream})
        assert status == (500 if is_fault else 400)
        kind = "server_error" if is_fault else "invalid_request_error"
        error = {"message": "no way", "type": kind, "param": None, "code": "c"}
        assert json.loads(text) == {"error": error}


def test_a_stream_that_fails_later_ends_in_an_error_and_frees_its_place() -> None:
    def die(message: Any) -> Sequence[Any]:
        return [Piece(id=message.id, text="a"), RequestError(503, "the process ended")]

    front = Fronted(LIMITS.model_copy(update={"n_waiting": 0}), die)
    for _ in range(3):  # a place that is not freed would be a 429
        status, text, _ = front.ask(COMPLETIONS, {"stream": True})
        assert status == 200
        last = [event for event in text.split("\n\n") if event][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the process ended"


def test_a_client_that_reads_nothing_keeps_no_place_when_its_job_has_ended() -> None:
    front = Fronted(LIMITS.model_copy(update={"n_waiting": 0}))
    begun = asyncio.Event()

    async def stall(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            begun.set()
            await asyncio.sleep(3600)

    async def scenario() -> tuple[int, str, dict[str, str]]:
        stalled = asyncio.ensure_future(
            front.respond(*front.request(COMPLETIONS, {"stream": True}), stall)
        )
        await begun.wait()
        answer = await front._answer(*front.request(COMPLETIONS, {}))
        stalled.cancel()
        return answer

    status, text, _ = asyncio.run(scenario())
    assert status == 200, text


def test_a_stream_keeps_its_place_until_its_job_has_ended() -> None:
    front = Fronted(LIMITS.model_copy(update={"n_waiting": 0}))
    job = Job(front.model, Tokenize(id=0, text=""))  # type: ignore[arg-type]  # the stub

    async def scenario() -> tuple[int, int]:
        front.api._admit()
        front.api._spawn(front.api._free_at_end(job))
        await asyncio.sleep(0.01)
        before = front.api._n_admitted
        job.ended.set()
        await asyncio.sleep(0.01)
        return before, front.api._n_admitted

    assert asyncio.run(scenario()) == (1, 0)


def test_a_format_that_makes_no_prompt_is_an_error_before_anybody_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(_: Any, __: ChatFormat) -> None: ...

    async def render(_: Any, __: ChatFormat, ___: Render) -> Rendered:
        raise RequestError(400, "no tokenizer")

    monkeypatch.setattr(Templates, "start", start)
    monkeypatch.setattr(Templates, "render", render)
    front = Fronted()
    with pytest.raises(EngineError, match=r"format chatml makes no prompt here \(no tokenizer\)"):
        asyncio.run(front.api.try_template())
    front.model.loaded.chat = FORMAT.model_copy(update={"template": "x"})  # may refuse one chat
    asyncio.run(front.api.try_template())


_WORKER = """
import sys
from ramgguf.llama.protocol import SystemInfo
from ramgguf.llama.server_protocol import ChatFormat, Loaded

def main():
    sys.stdin.readline()
    chat = ChatFormat(name="chatml", template=None, bos_token="", eos_token="", eos_id=-1)
    print(Loaded(system=SystemInfo.model_construct(), chat=chat).model_dump_json(), flush=True)
    if sys.stdin.readline():
        print("what is no message", flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("error", [BlockingIOError(11, "try again"), MemoryError(), None])
def test_the_model_is_loaded_again_also_when_the_system_cannot_start_it_once(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stub_worker.py").write_text(_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start, n_starts = asyncio.create_subprocess_exec, 0

    async def flaky(*arguments: Any, **options: Any) -> Any:
        nonlocal n_starts
        n_starts += 1
        if n_starts == 2 and error is not None:
            raise error
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", flaky)
    monkeypatch.setattr(children, "_LOADED", TypeAdapter(Any))

    async def scenario() -> None:
        model = Model("stub_worker", SERVE, LIMITS)
        await model.start()
        job = await model.submit(Tokenize(id=0, text=""))  # the worker answers nonsense
        async with asyncio.timeout(60):
            with pytest.raises(RequestError, match="it is loaded again"):
                await job.next()
            while not model.is_ready:
                await asyncio.sleep(0.05)
        assert model._process is not None
        for task in model._tasks:
            task.cancel()
        model._process.kill()
        await model._process.reap()

    asyncio.run(scenario())
    assert n_starts == (2 if error is None else 3)


def test_a_child_that_cannot_be_started_is_a_line_with_a_time_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "try again")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    status, text, headers = Fronted().ask(CHAT, chat())
    assert (status, headers["retry-after"]) == (503, "1")
    assert "ramgguf.llama.chat cannot be started" in json.loads(text)["error"]["message"]


def test_more_requests_than_may_wait_are_refused_with_a_time_to_come_back() -> None:
    front = Fronted(LIMITS.model_copy(update={"n_waiting": 2}))
    for _ in range(3):
        front.api._admit()
    status, text, headers = front.ask(COMPLETIONS, {})
    assert (status, headers["retry-after"]) == (429, "1")
    assert "too many requests wait (2 may)" in text


def test_a_client_that_goes_away_takes_its_work_with_it() -> None:
    async def scenario() -> bool:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        with contextlib.suppress(RequestError):
            await fronts._unless_gone(SimpleNamespace(receive=receive), work())
        return ended.is_set()

    assert asyncio.run(scenario())


def test_an_address_that_cannot_be_listened_at_is_a_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(EngineError, match="choose another --host or --port"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(EngineError, match="cannot be listened at"):
        bind("256.0.0.1", 1)
    for port in (65536, 99999, -1, 2**70):
        with pytest.raises(EngineError, match="choose another --port"):
            bind("127.0.0.1", port)


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = error_body("a\n b\x0b\tc", 400)["error"]
    assert (error["message"], error["type"]) == ("a b c", "invalid_request_error")


def test_what_a_request_may_take_follows_from_the_context() -> None:
    assert prompt_bytes(256) == prompt_bytes(2048) == 64 << 10
    assert prompt_bytes(4096) == 32 * 4096
    more = request_bytes(2 << 20, allow_grammars=False) - request_bytes(
        1 << 20, allow_grammars=False
    )
    assert more >= 165 << 20  # what the tokenizer took for each MiB
    with_grammars = request_bytes(0, allow_grammars=True) - request_bytes(0, allow_grammars=False)
    assert with_grammars > GRAMMAR_BYTES
