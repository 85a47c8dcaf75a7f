"""What strangers send to the server: each request is refused in a line; the next is answered."""

import http.client
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bigram_model import write_bigram_model
from ramgguf.core.machine import Available
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.serving import Place, Server, planned_settings
from serve_requests import (
    CHAT,
    FORMAT,
    GOOD,
    HUGE_SCHEMA,
    LEFT_RECURSION,
    MALFORMED,
    MOST_BYTES,
    N_CONTEXT,
    NESTED,
    OTHER_HOSTS,
    OTHER_ORIGINS,
    UNDEFINED,
    WRONG_CHATS,
    WRONG_NUMBERS,
    WRONG_TOKENS,
    Reply,
    ask,
    many_wrong,
    model_pid,
    serve,
    until_ready,
    write_model,
)

pytest.importorskip("llama_cpp")
pytest.importorskip("starlette")


def complete(server: Server, **options: Any) -> Reply:
    return ask(server, "/v1/completions", GOOD | options)


def say(server: Server, content: str, **options: Any) -> Reply:
    messages = [{"role": "user", "content": content}]
    return ask(server, CHAT, {"messages": messages, "max_tokens": 2} | options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return write_model(folder / "chat.gguf")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serve(model) as found:
        yield found


@pytest.fixture(scope="module")
def with_grammars(model: Path) -> Iterator[Server]:
    with serve(model, allow_grammars=True) as found:
        yield found


@pytest.fixture
def unharmed(server: Server) -> Iterator[Server]:
    """The server, whose model's process must be the same after the test, and answer."""
    before = model_pid(server)
    yield server
    assert complete(server).status == 200
    assert model_pid(server) == before


@pytest.mark.parametrize("grammar", [UNDEFINED, LEFT_RECURSION, NESTED, 'root ::= "a"'])
def test_grammars_are_off_by_default(unharmed: Server, grammar: str) -> None:
    assert "--allow-grammars" in complete(unharmed, grammar=grammar).line


def test_json_schemas_are_off_by_default(unharmed: Server) -> None:
    for told in (FORMAT, {"type": "json_schema", "json_schema": {"schema": HUGE_SCHEMA}}):
        reply = say(unharmed, "hi", response_format=told)
        assert reply.status == 400
        assert "--allow-grammars" in reply.line


@pytest.mark.parametrize("grammar", [UNDEFINED, LEFT_RECURSION, NESTED, "\x00", "((("])
def test_a_grammar_that_ends_llama_cpp_is_a_bad_request(
    with_grammars: Server, grammar: str
) -> None:
    before = model_pid(with_grammars)
    reply = complete(with_grammars, grammar=grammar)
    assert reply.status == 400
    assert "grammar" in reply.line
    assert complete(with_grammars).status == 200
    assert model_pid(with_grammars) == before


def test_a_schema_that_takes_all_memory_is_a_bad_request(with_grammars: Server) -> None:
    before = model_pid(with_grammars)
    reply = say(with_grammars, "hi", response_format=FORMAT)
    assert reply.status == 400
    assert "grammar" in reply.line
    assert model_pid(with_grammars) == before


def test_allowed_grammars_and_schemas_are_kept_to(with_grammars: Server) -> None:
    reply = complete(with_grammars, grammar='root ::= "xyz"', max_tokens=10)
    assert reply.json["choices"][0]["text"] == "xyz"
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"]}
    told = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    reply = say(with_grammars, "hi", response_format=told, max_tokens=200)
    assert json.loads(reply.json["choices"][0]["message"]["content"]) == {"a": 7}


def test_a_body_that_is_too_large_is_refused_before_it_is_read(unharmed: Server) -> None:
    for path in ("/v1/completions", CHAT, "/extras/tokenize", "/extras/tokenize/count",
                 "/extras/detokenize"):  # fmt: skip
        # As curl does it, the request says its length first.
        connection = http.client.HTTPConnection("127.0.0.1", unharmed.serving.port, timeout=60)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(200_000_000))
        connection.endheaders(b'{"prompt": "')
        answer = connection.getresponse()
        assert answer.status == 413
        answer.read()
        answer.close()
        connection.close()


def test_a_body_that_does_not_say_its_length_is_cut_off(unharmed: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", unharmed.serving.port, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    n_sent = 0
    try:
        for _ in range(3000):
            connection.send(chunk)
            n_sent += len(chunk)
    except OSError:  # the server has closed it
        pass
    assert n_sent < 100_000_000
    connection.close()


def test_a_long_prompt_is_refused_by_its_bytes_before_it_is_tokenized(unharmed: Server) -> None:
    text = "x" * (32 * N_CONTEXT + 1)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/extras/tokenize", {"input": text}),
        ("/extras/tokenize/count", {"input": text}),
    ):
        reply = ask(unharmed, path, body)
        assert reply.status == 400
        assert "bytes, more than" in reply.line
    assert "maximum context length" in complete(unharmed, prompt="x" * N_CONTEXT).line


def test_a_template_that_loops_holds_up_nobody_who_asks_for_a_completion(unharmed: Server) -> None:
    assert say(unharmed, "hi").status == 200  # its process is started
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        looping = pool.submit(say, unharmed, "loop")
        time.sleep(0.3)
        assert complete(unharmed).status == 200
        assert not looping.done()
        reply = looping.result()
    assert time.monotonic() - started < 60
    assert reply.status == 400
    assert "template took longer than 2 seconds" in reply.line
    assert say(unharmed, "hi").status == 200


@pytest.mark.parametrize(
    ("content", "told"),
    [("memory", "memory"), ("raise", "ValueError: not"), ("escape", "SecurityError")],
)
def test_a_template_that_does_wrong_is_a_bad_request(
    unharmed: Server, content: str, told: str
) -> None:
    reply = say(unharmed, content)
    assert reply.status == 400
    assert told in reply.line
    assert say(unharmed, "hi").status == 200


def test_a_template_whose_constants_take_all_memory_is_held_to_its_own_process(
    tmp_path: Path,
) -> None:
    hostile = "{{ ('x' * 8000000000) | length }}"
    path = write_bigram_model(tmp_path / "m.gguf", template=hostile, n_context=N_CONTEXT)
    with serve(path) as found:
        reply = say(found, "hi")
        assert reply.status == 400
        assert "memory" in reply.line
        status = Path(f"/proc/{model_pid(found)}/status").read_text()
        (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        assert int(peak.split()[1]) < 1_000_000  # kB


@pytest.mark.parametrize("name", WRONG_NUMBERS)
@pytest.mark.parametrize("stream", [False, True])
def test_options_out_of_range_are_bad_requests_that_name_them(
    unharmed: Server, name: str, stream: bool
) -> None:
    for value in WRONG_NUMBERS[name]:
        reply = complete(unharmed, **({"stream": stream} | {name: value}))
        assert (reply.status, value) == (400, value)
        assert name in reply.line or "token 999999" in reply.line


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_bodies_are_bad_requests(unharmed: Server, body: bytes) -> None:
    for path in ("/v1/completions", CHAT, "/extras/tokenize", "/extras/detokenize"):
        reply = ask(unharmed, path, body)
        assert reply.status == 400
        assert reply.line


def test_a_body_of_wrong_elements_takes_a_part_of_what_is_planned(server: Server) -> None:
    def peak() -> int:
        status = Path(f"/proc/{server.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])

    before = peak()
    for path, body in many_wrong(MOST_BYTES):
        reply = ask(server, path, body)
        assert reply.status == 400
        assert reply.line
    assert peak() - before < 50_000_000


def test_wrong_chats_and_tokens_are_bad_requests(unharmed: Server) -> None:
    for messages in WRONG_CHATS:
        assert ask(unharmed, CHAT, {"messages": messages}).status == 400
    for tokens in WRONG_TOKENS:
        assert ask(unharmed, "/extras/detokenize", {"tokens": tokens}).status == 400


def test_texts_and_tokens_come_back(server: Server) -> None:
    tokens = ask(server, "/extras/tokenize", {"input": "The sea"}).json["tokens"]
    assert ask(server, "/extras/detokenize", {"tokens": tokens}).json["text"] == "The sea"
    counted = ask(server, "/extras/tokenize/count", {"input": "The sea"}).json["count"]
    assert counted == len(tokens)


def test_what_is_no_endpoint_is_404_and_a_wrong_method_405(unharmed: Server) -> None:
    for path in ("/", "/v1", "/docs", "/openapi.json", "/v1/embeddings", "/../etc/passwd"):
        reply = ask(unharmed, path)
        assert reply.status == 404
        assert "no endpoint" in reply.line
    assert ask(unharmed, "/v1/completions").status == 405
    assert ask(unharmed, "/v1/models", {}, method="DELETE").status == 405


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_another_host_is_refused(unharmed: Server, host: str) -> None:
    assert ask(unharmed, "/v1/models", headers={"Host": host}).status == 400


def test_loopback_names_are_hosts(server: Server) -> None:
    for host in ("localhost:1234", "127.0.0.1", "[::1]:80"):
        assert ask(server, "/v1/models", headers={"Host": host}).status == 200


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_another_origin_is_refused_and_never_reflected(unharmed: Server, origin: str) -> None:
    for method, body in (("GET", None), ("POST", GOOD), ("OPTIONS", None)):
        path = "/v1/models" if method == "GET" else "/v1/completions"
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = ask(unharmed, path, body, headers, method)
        assert reply.status == 403
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_cors_is_off_until_an_origin_is_allowed(server: Server, model: Path) -> None:
    reply = ask(server, "/v1/models", headers={"Origin": "http://localhost:3000"})
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers
    page = "https://page.example"
    with serve(model, origins=(page,), hosts=("llm.example",)) as found:
        headers = {"Origin": page, "Host": "llm.example"}
        reply = ask(found, "/v1/models", headers=headers)
        assert reply.headers["access-control-allow-origin"] == page
        assert "access-control-allow-credentials" not in reply.headers
        headers["Origin"] = "https://evil.example"
        assert ask(found, "/v1/models", headers=headers).status == 403


def test_more_requests_than_may_wait_are_told_to_come_back(model: Path) -> None:
    with serve(model, n_waiting=1) as found, ThreadPoolExecutor(8) as pool:
        long = {"max_tokens": 3000, "prompt": "The "}
        replies = list(pool.map(lambda _: complete(found, **long), range(8)))
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 2
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.headers["retry-after"] == "1"
    assert "too many requests wait (1 may)" in refused.line


def test_an_answer_that_takes_too_long_ends_and_a_stream_says_so(model: Path) -> None:
    with serve(model, seconds=0.3) as found:
        before = model_pid(found)
        reply = complete(found, max_tokens=4000)
        assert reply.status == 503
        assert "longer than 0.3 seconds" in reply.line
        streamed = complete(found, max_tokens=4000, stream=True)
        events = [line for line in streamed.body.decode().split("\n\n") if line]
        last = json.loads(events[-1].removeprefix("data: "))
        assert "longer than 0.3 seconds" in last["error"]["message"]
        assert complete(found).status == 200
        assert model_pid(found) == before


def test_a_model_that_dies_is_loaded_again_and_who_asked_is_told(model: Path) -> None:
    with serve(model) as found, ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            before = model_pid(found)
            os.kill(before, signal.SIGSTOP)  # it cannot be done before it is killed
            asked = pool.submit(complete, found)
            time.sleep(0.3)
            os.kill(before, signal.SIGKILL)
            reply = asked.result()
            assert reply.status == 503
            assert "SIGKILL" in reply.line
            until_ready(found)
            assert complete(found).status == 200
            assert model_pid(found) != before


def test_a_stream_whose_model_dies_ends_in_an_error(model: Path) -> None:
    with serve(model) as found:
        connection = http.client.HTTPConnection("127.0.0.1", found.serving.port, timeout=60)
        body = json.dumps(GOOD | {"max_tokens": 4000, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        os.kill(model_pid(found), signal.SIGKILL)
        last = [line for line in answer.read().decode().split("\n\n") if line][-1]
        assert "SIGKILL" in json.loads(last.removeprefix("data: "))["error"]["message"]
        connection.close()


def test_clients_that_go_away_free_the_model(server: Server) -> None:
    started = time.monotonic()
    for stream in (False, True) * 3:
        connection = http.client.HTTPConnection("127.0.0.1", server.serving.port, timeout=60)
        body = json.dumps(GOOD | {"max_tokens": 4000, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.close()
    assert complete(server).status == 200
    alone = time.monotonic()
    assert complete(server, max_tokens=4000).status == 200
    took = time.monotonic() - alone
    assert alone - started < 6 * took + 1


def test_a_wrong_key_is_refused_everywhere(model: Path) -> None:
    with serve(model, api_key="the right one") as found:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"},
                        {"Authorization": "Bearer \xff"}):  # fmt: skip
            assert ask(found, "/v1/models", headers=headers).status == 401
            for path in ("/v1/completions", CHAT, "/extras/tokenize", "/extras/detokenize"):
                assert ask(found, path, b"{", headers).status == 401
        right = {"Authorization": "Bearer the right one"}
        assert ask(found, "/v1/models", headers=right).status == 200


def data_bytes(pid: int, name: str) -> int:
    """Return a size that Linux tells of a process: VmData, or Pss, shared pages by shares."""
    file = "smaps_rollup" if name == "Pss" else "status"
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


@pytest.mark.parametrize("allow_grammars", [False, True])
def test_the_models_process_may_grow_by_what_is_planned_for_a_request(
    model: Path, allow_grammars: bool
) -> None:
    room = Available(10**10, "a test")
    settings = planned_settings(
        model, ContextShape(2048), room, n_threads=1, allow_grammars=allow_grammars
    )
    with Server(settings, Place(port=0)) as found:
        pid = model_pid(found)
        limits = Path(f"/proc/{pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max data size")]
        growth = int(line.split()[3]) - data_bytes(pid, "VmData")
    assert 0.8 * settings.request_bytes < growth <= settings.request_bytes


def test_the_server_takes_no_more_than_is_planned_after_the_largest_requests(model: Path) -> None:
    settings = planned_settings(
        model, ContextShape(N_CONTEXT), Available(10**10, "a test"), n_threads=1
    )
    with Server(settings, Place(port=0)) as found:
        biased: dict[str, Any] = {"logit_bias": {str(i): 1 for i in range(200)}, "mirostat_mode": 2}
        assert complete(found, prompt="x" * (N_CONTEXT - 10), **biased).status == 200
        assert say(found, "hi").status == 200
        for text in ("x", "é", " "):
            longest = text * (32 * N_CONTEXT // len(text.encode()))
            assert ask(found, "/extras/tokenize", {"input": longest}).status == 200
        children = Path(f"/proc/{found.pid}/task/{found.pid}/children").read_text().split()
        pids = [found.pid, *map(int, children)]
        taken = sum(data_bytes(pid, "Pss") for pid in pids)
    assert 0.3 * settings.needed < taken < settings.needed


def test_the_longest_prompt_of_a_long_context_does_not_end_the_model(model: Path) -> None:
    """Its tokens take 350 MB: the limit must follow from the context."""
    settings = planned_settings(
        model, ContextShape(1 << 17), Available(10**10, "a test"), n_threads=1
    )
    with Server(settings, Place(port=0)) as found:
        before = model_pid(found)
        reply = complete(found, prompt="x" * (32 << 17))
        assert reply.status == 400
        assert "maximum context length" in reply.line
        assert model_pid(found) == before


def test_many_clients_at_once_get_their_own_answers(server: Server) -> None:
    counter = itertools.count()
    lock = threading.Lock()

    def one(_: int) -> bool:
        with lock:
            n = 1 + next(counter) % 5
        reply = complete(server, max_tokens=n)
        return bool(reply.json["usage"]["completion_tokens"] == n)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(64)))
