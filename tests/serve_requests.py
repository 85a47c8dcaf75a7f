"""What clients send to the server: hostile requests of every kind, and good ones; and how."""

import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigram_model import write_bigram_model
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.serving import Place, Server, Settings

N_CONTEXT = 4096
MOST_BYTES = Place().limits(N_CONTEXT).body_bytes
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOKENIZE, DETOKENIZE = "/extras/tokenize", "/extras/detokenize"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['content'] == 'loop' %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% if m['content'] == 'memory' %}{% set x = 'x' * (2000000000 + m | length) %}"
    "{{ x | length }}{% endif %}"
    "{% if m['content'] == 'raise' %}{{ raise_exception('not\nso') }}{% endif %}"
    "{% if m['content'] == 'escape' %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}>"
)
GOOD: dict[str, Any] = {"prompt": "The ", "max_tokens": 2, "temperature": 0}
UNDEFINED = 'root ::= "a" missing'
LEFT_RECURSION = 'root ::= root "a" | "a"'
NESTED = "root ::= " + "(" * 12 + '"a"' + "){0,2000}" * 12
HUGE_SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000_000}
FORMAT = {"type": "json_object", "schema": HUGE_SCHEMA}
WRONG_NUMBERS: dict[str, list[Any]] = {
    "temperature": [-1, "hot", 1e9], "top_p": [-0.1, 1.1], "min_p": [2], "typical_p": [0],
    "top_k": [-1, 1.5, 10**12], "repeat_penalty": [0, -1, 1e30], "presence_penalty": [3],
    "frequency_penalty": [-3], "mirostat_mode": [3], "mirostat_tau": [-1], "mirostat_eta": [0],
    "seed": [-2, 2**32, 2**70], "max_tokens": [0, -1, N_CONTEXT + 1, 10**30], "n": [2, 0],
    "logit_bias": [{"x": 1}, {"999999": 1}, {"1": 1e9}, 5], "stop": [[""], [1], ["x"] * 17],
    "prompt": [None, 5, [], ["a", "b"], [[1]]], "stream": ["perhaps"], "no_such_option": [1],
}  # fmt: skip
MALFORMED = (
    b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"temperature": NaN}',
    b'{"temperature": Infinity}', b"[" * 50_000, b'{"a":' * 50_000, b'{"prompt": "x"} trailing',
)  # fmt: skip
WRONG_CHATS: tuple[list[Any], ...] = (
    [], [{}], [{"role": "boss", "content": "x"}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": "\x00", "x": 1}],
)  # fmt: skip
WRONG_TOKENS: tuple[list[Any], ...] = ([-1], [2**31], [2**62], [10**9], ["a"], [1.5])


def many_wrong(n_bytes: int) -> tuple[tuple[str, bytes], ...]:
    """Return paths, and bodies of n_bytes at most whose every element or key is wrong."""

    def full(before: str, element: str, after: str) -> bytes:
        n = (n_bytes - len(before) - len(after)) // (len(element) + 1)
        return (before + ",".join([element] * n) + after).encode()

    keys = ",".join(f'"k{i}":"x"' for i in range(n_bytes // 20))
    ids = ",".join(f'"{i}":"x"' for i in range(n_bytes // 20))
    hi = '"messages":[{"role":"user"'
    return (
        (CHAT, full('{"messages":[', "1", "]}")),
        (CHAT, full('{"messages":[', "{}", "]}")),
        (CHAT, full('{"messages":[', '{"role":"user"}', "]}")),
        (CHAT, full(f'{{{hi},"content":[', "1", "]}]}")),
        (CHAT, full(f'{{{hi},"content":[', '{"type":"text","text":""}', "]}]}")),
        (CHAT, full(f'{{{hi},"tool_calls":[', "1", "]}]}")),
        (CHAT, full(f'{{{hi},"tool_calls":[', "{}", "]}]}")),
        (CHAT, full(f'{{{hi}}}],"tools":[', "1", "]}")),
        (CHAT, full(f'{{{hi}}}],"tools":[', "{}", "]}")),
        (CHAT, f"{{{hi},{keys}}}]}}".encode()),
        (COMPLETIONS, full('{"stop":[', "1", "]}")),
        (COMPLETIONS, full('{"prompt":[', "1", "]}")),
        (COMPLETIONS, f"{{{keys}}}".encode()),
        (COMPLETIONS, f'{{"logit_bias":{{{keys}}}}}'.encode()),
        (COMPLETIONS, f'{{"logit_bias":{{{ids}}}}}'.encode()),
        (DETOKENIZE, full('{"tokens":[', "-1", "]}")),
    )


OTHER_HOSTS = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "")
OTHER_ORIGINS = ("https://evil.example", "null", "http://localhost.evil.example")


@dataclass(frozen=True)
class Reply:
    """A status and a body."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def line(self) -> str:
        """The error, which is one line."""
        message: str = self.json["error"]["message"]
        assert message
        assert "\n" not in message
        assert len(message) < 1000
        return message


def ask(
    server: Server,
    path: str,
    body: bytes | Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", server.serving.port, timeout=120)
    try:
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        method = method or ("GET" if data is None else "POST")
        connection.request(
            method, path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        return Reply(answer.status, answer.read(), dict(answer.getheaders()))
    finally:
        connection.close()


def model_pid(server: Server) -> int:
    """Return the front's child that runs the model."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"ramgguf.llama.server" in _command(pid)]
    return found


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # a child that has ended meanwhile
        return b""


def until_ready(server: Server) -> None:
    end = time.monotonic() + 120
    while ask(server, "/health").status != 200:
        assert time.monotonic() < end
        time.sleep(0.05)


def serve(model: Path, **options: Any) -> Server:
    settings = Settings(
        model, "chat", ContextShape(N_CONTEXT), 1, None, 1, "estimate",
        allow_grammars=options.pop("allow_grammars", False),
    )  # fmt: skip
    return Server(settings, Place(port=0, **options))


def write_model(path: Path) -> Path:
    """Write a model whose chat template does wrong when it is asked to."""
    return write_bigram_model(path, template=TEMPLATE, n_context=N_CONTEXT)


@dataclass(frozen=True)
class Hostile:
    """A request, and the statuses that it may be answered with."""

    kind: str
    send: Callable[[Server], int]
    allowed: frozenset[int] = frozenset((400,))


def _posted(path: str, body: Any, **headers: str) -> Callable[[Server], int]:
    return lambda server: ask(server, path, body, headers).status


def _chat(content: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2, **options}


def hostile_requests() -> tuple[Hostile, ...]:
    """Return one of every kind and value, those that take long or kill at the end."""
    long = "x" * (32 * N_CONTEXT + 1)
    found = [
        Hostile(
            f"{name} out of range", _posted(COMPLETIONS, GOOD | {"stream": stream, name: value})
        )
        for name, values in WRONG_NUMBERS.items()
        for value in values
        for stream in (False, True)
        if (name, stream) != ("stream", True)
    ]
    paths = (COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE)
    found += [Hostile("malformed", _posted(path, body)) for body in MALFORMED for path in paths]
    found += [Hostile("many wrong", _posted(path, body)) for path, body in many_wrong(MOST_BYTES)]
    found += [Hostile("wrong chat", _posted(CHAT, {"messages": chat})) for chat in WRONG_CHATS]
    found += [Hostile("tokens", _posted(DETOKENIZE, {"tokens": ids})) for ids in WRONG_TOKENS]
    found += [
        Hostile("long text", _posted(path, body))
        for path, body in (
            (COMPLETIONS, {"prompt": long}), (CHAT, _chat(long)), (TOKENIZE, {"input": long}),
            (COMPLETIONS, {"prompt": "x" * N_CONTEXT}),
        )
    ]  # fmt: skip
    found += [Hostile("host", _posted("/v1/models", None, Host=host)) for host in OTHER_HOSTS]
    found += [
        Hostile("origin", _posted(COMPLETIONS, GOOD, Origin=origin), frozenset((403,)))
        for origin in OTHER_ORIGINS
    ]
    found += [
        Hostile("grammar", _posted(COMPLETIONS, GOOD | {"grammar": grammar}))
        for grammar in (UNDEFINED, LEFT_RECURSION, "\x00", "(((")
    ]
    found += [Hostile("template", _posted(CHAT, _chat(c))) for c in ("raise", "escape", "memory")]
    found += [
        Hostile("huge body", _declares_too_much, frozenset((413,))),
        Hostile("endless body", _sends_too_much, frozenset((0, 413))),
        Hostile("gone", _goes_away, frozenset((0,))),
        Hostile("gone", _goes_away_from_a_stream, frozenset((0,))),
    ]
    return tuple(found)


def slow_requests() -> tuple[Hostile, ...]:
    """Return those that take seconds: grammars and templates that run into their limits."""
    return (
        Hostile("grammar", _posted(COMPLETIONS, GOOD | {"grammar": NESTED})),
        Hostile("schema", _posted(CHAT, _chat("hi", response_format=FORMAT))),
        Hostile("template", _posted(CHAT, _chat("loop"))),
        Hostile("killed", _is_killed, frozenset((503,))),
    )


@contextlib.contextmanager
def _connection(server: Server) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", server.serving.port, timeout=60)
    try:
        yield connection
    finally:
        connection.close()


def _declares_too_much(server: Server) -> int:
    with _connection(server) as connection:
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Length", str(200_000_000))
        connection.endheaders(b'{"prompt": "')
        answer = connection.getresponse()
        answer.read()
        answer.close()
        return answer.status


def _sends_too_much(server: Server) -> int:
    """Send a body without end; 0 when the server has closed the connection first."""
    with _connection(server) as connection:
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        try:
            for _ in range(1000):
                connection.send(chunk)
        except OSError:
            return 0
        raise AssertionError("64 MB were taken")


def _goes_away(server: Server, *, stream: bool = False) -> int:
    with _connection(server) as connection:
        body = json.dumps(GOOD | {"max_tokens": 4000, "stream": stream})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
    return 0


def _goes_away_from_a_stream(server: Server) -> int:
    return _goes_away(server, stream=True)


def _is_killed(server: Server) -> int:
    """Kill the model's process. Requests until it is loaded again must get 503."""
    os.kill(model_pid(server), signal.SIGKILL)
    for _ in range(1000):  # the front has not noticed yet, or has loaded it again
        status = ask(server, COMPLETIONS, GOOD).status
        if status == 503:
            break
    until_ready(server)
    return status


def good_requests() -> tuple[Callable[[Server], bool], ...]:
    """Return requests that tell whether they were answered as they must be."""

    def completes(server: Server) -> bool:
        reply = ask(server, COMPLETIONS, GOOD)
        return reply.status == 200 and reply.json["usage"]["completion_tokens"] == 2

    def streams(server: Server) -> bool:
        reply = ask(server, COMPLETIONS, GOOD | {"stream": True})
        return reply.status == 200 and reply.body.endswith(b"data: [DONE]\n\n")

    def chats(server: Server) -> bool:
        reply = ask(server, CHAT, _chat("hi"))
        return reply.status == 200 and reply.json["choices"][0]["message"]["role"] == "assistant"

    def tokenizes(server: Server) -> bool:
        tokens = ask(server, TOKENIZE, {"input": "The sea"}).json["tokens"]
        return bool(ask(server, DETOKENIZE, {"tokens": tokens}).json["text"] == "The sea")

    return completes, streams, chats, tokenizes, completes
