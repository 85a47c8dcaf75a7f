"""The server, as its clients see it: what it answers, what it refuses, and how it ends."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from bigram_model import write_bigram_model
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError, ResultError
from ramgguf.core.machine import Available
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.collapse_checks import KNOWN_TEXT
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.front_requests import request_bytes
from ramgguf.deploy.result import CheckResult
from ramgguf.deploy.serving import (
    SERVER_BYTES,
    Place,
    Server,
    Settings,
    checked_settings,
    planned_settings,
)
from ramgguf.llama import server as engine_server
from ramgguf.llama.server_protocol import Serve
from ramgguf.report.serving import conditions, curl

pytest.importorskip("llama_cpp")
openai = pytest.importorskip("openai")

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
TEMPLATE = (
    "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
DEADLINE = 300  # seconds, on a machine that has other things to do
ENOUGH = Available(2_000_000_000, "a test")


@dataclass(frozen=True)
class Running:
    """A server's process, and the lines that it printed to say so."""

    process: subprocess.Popen[str]
    lines: tuple[str, ...]

    @property
    def url(self) -> str:
        return self.lines[0].partition(" at ")[2].split()[0]


@contextlib.contextmanager
def _started(*arguments: str | Path, n_lines: int) -> Iterator[Running]:
    """Start the command, wait for the lines that it prints when it serves; end it in the end."""
    command = [RAMGGUF, "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )
    try:
        with _deadline(process):
            lines = tuple(_pipe(process.stdout).readline().rstrip() for _ in range(n_lines))
        if process.poll() is not None:
            raise AssertionError(_pipe(process.stderr).read())
        yield Running(process, lines)
    finally:
        process.terminate()
        with _deadline(process):
            process.communicate()


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[str]) -> Iterator[None]:
    timer = threading.Timer(DEADLINE, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextlib.contextmanager
def _client(url: str, key: str = "none") -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "*")
        with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=DEADLINE) as found:
            yield found


def _most_likely_after(text: str, n: int) -> str:
    """Return what follows a text when after each character comes its most frequent successor."""
    around = KNOWN_TEXT + KNOWN_TEXT[0]
    for _ in range(n):
        followers = [b for a, b in itertools.pairwise(around) if a == text[-1]]
        best, second = sorted((followers.count(c) for c in {*followers, ""}), reverse=True)[:2]
        assert best > second  # else the test would hang on rounding
        text += max(set(followers), key=followers.count)
    return text[-n:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return write_bigram_model(folder / "chat.gguf", template=TEMPLATE, n_context=4096)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return write_bigram_model(folder / "plain.gguf", n_context=4096)


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    with _started(model, "--context", "512", "--threads", "1", n_lines=3) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Any]:
    with _client(running.url) as found:
        yield found


def test_it_says_what_it_serves_and_how_to_ask(running: Running, model: Path) -> None:
    assert running.lines[0].startswith(f"serving {model} as chat at http://127.0.0.1:")
    for word in ("context 512", "cache F16/F16", "1 thread,", "the file’s template", "memory"):
        assert word in running.lines[1]
    command = running.lines[2].strip()
    done = subprocess.run(
        ["sh", "-c", command.replace("curl", "curl -s --noproxy '*'", 1)],
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["model"] == "chat"


def test_the_model_is_listed_by_its_name(client: Any) -> None:
    assert [m.id for m in client.models.list()] == ["chat"]


# llama-cpp-python's server punishes repetition by default.
PLAINLY = {"repeat_penalty": 1.0}


def test_a_prompt_is_completed_with_what_the_model_finds_most_likely(client: Any) -> None:
    done = client.completions.create(
        model="chat", prompt="Then w", max_tokens=6, temperature=0, extra_body=PLAINLY
    )
    assert done.choices[0].text == _most_likely_after("w", 6) == "and th"
    assert done.usage.completion_tokens == 6


def test_a_chat_is_put_as_the_files_template_has_it(client: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    done = client.chat.completions.create(
        model="chat", messages=messages, max_tokens=3, temperature=0, extra_body=PLAINLY
    )
    assert done.usage.prompt_tokens == len("[hi]>")
    assert done.choices[0].message.content == "Th" + _most_likely_after("h", 1)
    assert done.choices[0].finish_reason == "length"


def test_a_stream_brings_the_same_piece_by_piece(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "chat",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(pieces) == whole
    assert sum(map(bool, pieces)) > 3


def test_a_request_waits_for_the_one_before_and_cuts_nothing_off(client: Any) -> None:
    asked: dict[str, Any] = {"model": "chat", "max_tokens": 40, "temperature": 0}
    stream = client.completions.create(prompt="The sea ", stream=True, **asked)
    pieces = [next(stream).choices[0].text]
    others: list[str] = []
    thread = threading.Thread(
        target=lambda: others.append(
            client.completions.create(prompt="The land ", **asked).choices[0].text
        )
    )
    thread.start()
    pieces += [chunk.choices[0].text for chunk in stream]
    thread.join()
    assert len("".join(pieces)) >= 40
    assert len(others[0]) >= 40


def test_a_prompt_beyond_the_context_is_a_bad_request_that_says_so(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as caught:
        client.completions.create(model="chat", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_wrong_requests_are_bad_requests_in_one_line(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="messages: ") as caught:
        client.chat.completions.create(model="chat", messages="hi")
    assert ".py" not in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported"):
        client.completions.create(model="chat", prompt="x", logprobs=2)


def test_it_ends_on_sigterm_with_status_0_and_leaves_no_child(plain: Path) -> None:
    options = ("--context", "300", "--threads", "1", "--json")  # llama.cpp makes it 512
    with _started(plain, *options, n_lines=1) as found:
        told = json.loads(found.lines[0])
        children = _children(found.process.pid)
        assert len(children) == 1
        assert told["chat_format"] == "chatml"
        assert told["model"] == "plain"
        assert told["n_ctx"] == 512
        with _client(told["url"]) as client:
            done = client.completions.create(model="plain", prompt="x" * 400, max_tokens=2)
            assert done.usage.total_tokens == 402
        found.process.send_signal(signal.SIGTERM)
        with _deadline(found.process):
            assert found.process.wait() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
        port = int(told["url"].split(":")[2].split("/")[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    if not found.exists():
        pytest.skip("this system does not tell a process's children")
    return [int(child) for child in found.read_text().split()]


@pytest.fixture(scope="module")
def checked(model: Path) -> CheckResult:
    request = CheckRequest(
        ContextShape(256, 1, "Q8_0", "Q8_0"), ENOUGH, n_threads=1, n_repeats=1, n_prompt=32
    )
    return check_file(model, request)


def test_a_check_gives_the_settings_and_a_key_locks_others_out(
    model: Path, checked: CheckResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked.save(tmp_path / "check.json")
    monkeypatch.setenv("RAMGGUF_API_KEY", "the right one")
    # The server's packages would take settings from these.
    monkeypatch.setenv("CONFIG_FILE", "/nowhere.json")
    monkeypatch.setenv("N_CTX", "17")
    options = ("--check", tmp_path / "check.json", "--alias", "mine")
    with _started(model, *options, n_lines=3) as found:
        assert "context 256, cache Q8_0/Q8_0, 1 thread," in found.lines[1]
        assert "(measured)" in found.lines[1]
        assert "tokens/s when checked" in found.lines[1]
        assert "Bearer $RAMGGUF_API_KEY" in found.lines[2]
        with _client(found.url, "a wrong one") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with _client(found.url, "the right one") as client:
            assert [m.id for m in client.models.list()] == ["mine"]
            with pytest.raises(openai.BadRequestError, match="length is 256"):
                client.completions.create(model="mine", prompt="x" * 300)
            told = client.completions.create(model="mine", prompt="The ", max_tokens=2)
            assert told.usage.completion_tokens == 2
        found.process.send_signal(signal.SIGINT)
        with _deadline(found.process):
            assert found.process.wait() == 0


def test_a_check_of_another_file_or_a_failed_one_is_refused(
    model: Path, plain: Path, checked: CheckResult
) -> None:
    with pytest.raises(ResultError, match="the check is of another file"):
        checked_settings(plain, checked, ENOUGH, force=True)
    twin = checked.model_copy(update={"header_sha256": "another"})
    with pytest.raises(ResultError, match="the check is of another file"):
        checked_settings(model, twin, ENOUGH)
    failed = checked.model_copy(update={"failures": ("it babbles",)})
    with pytest.raises(ResultError, match="failed its check: it babbles; --force"):
        checked_settings(model, failed, ENOUGH)
    assert checked_settings(model, failed, ENOUGH, force=True).checked == failed


def test_what_was_measured_must_fit_what_is_left_now(model: Path, checked: CheckResult) -> None:
    assert checked.peak_bytes is not None
    needed = checked_settings(model, checked, ENOUGH).needed
    assert needed == checked.peak_bytes + SERVER_BYTES + request_bytes(
        64 << 10, allow_grammars=False
    )
    just = Available(needed, "a test")
    assert checked_settings(model, checked, just).needed == needed
    with pytest.raises(BudgetError, match="needs"):
        checked_settings(model, checked, just, allow_grammars=True)
    with pytest.raises(BudgetError, match="needs"):
        checked_settings(model, checked, Available(needed - 1, "a test"))


def test_what_does_not_fit_is_refused_in_one_line_with_what_would(model: Path) -> None:
    options = ["--context", str(1 << 18), "--memory", "300MB"]
    done = subprocess.run(
        [RAMGGUF, "serve", model, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    line = done.stderr.strip()
    assert line.count("\n") == 0
    assert line.startswith("error: chat.gguf with a context of 262144 tokens needs")
    longest = int(line.partition("--context ")[2].partition(";")[0])
    room = Available(300_000_000, "--memory")
    fits = planned_settings(model, ContextShape(longest), room, n_threads=1)
    assert fits.needed <= room.n_bytes
    with pytest.raises(BudgetError):
        planned_settings(model, ContextShape(longest + 256), room, n_threads=1)
    forced = planned_settings(model, ContextShape(1 << 18), room, n_threads=1, force=True)
    assert forced.needed > room.n_bytes


@pytest.mark.parametrize("option", [("--context", "512"), ("--cache-type", "f16"), ("-t", "2")])
def test_a_check_and_other_settings_are_wrong_usage(
    option: Sequence[str], model: Path, tmp_path: Path
) -> None:
    command = ["serve", str(model), "--check", str(tmp_path / "c.json"), *option]
    assert CliRunner().invoke(app, command).exit_code == 2


FREE = Place(port=0)


def _server(model: Path, place: Place = FREE, **options: Any) -> Server:
    settings = Settings(model, "chat", ContextShape(256), 1, None, 1, "estimate")
    return Server(settings, place, **options)


def test_where_kernels_crash_it_starts_again_without_them_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    said: list[str] = []
    with _server(model, worker="crashing_server", announce=said.append) as server:
        assert server.safe_kernels
        assert "safe kernels" in conditions(server)
        with _client(server.url) as client:
            assert client.completions.create(model="chat", prompt="x", max_tokens=1).choices
    told = [line for line in said if "once more, without its repacked kernels" in line]
    assert len(told) == 1
    assert "SIGSEGV" in told[0]
    place = Place(port=0, safe_kernels=False)
    with (
        pytest.raises(EngineError, match="SIGSEGV"),
        _server(model, place, worker="crashing_server"),
    ):
        pass


def test_a_server_that_dies_is_an_error(model: Path) -> None:
    with _server(model) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="the server ended with signal SIGKILL"):
            server.wait()


def test_a_port_that_is_taken_is_an_error_that_names_it(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(EngineError, match=f"127.0.0.1:{port} cannot be listened at"),
            _server(model, Place(port=port)),
        ):
            pass


def test_without_the_servers_packages_the_extra_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError(\"No module named 'uvicorn'\")\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with (
        pytest.raises(EngineError, match=r"'uvicorn'.*pip install 'ramgguf\[server\]'$"),
        _server(model),
    ):
        pass


def test_a_template_that_is_none_and_a_format_that_is_none_are_errors(
    model: Path, tmp_path: Path
) -> None:
    broken = write_bigram_model(tmp_path / "broken.gguf", template="{% if %}", n_context=4096)
    with pytest.raises(EngineError, match=r"serve it \(TemplateSyntaxError"), _server(broken):
        pass
    command = ["serve", str(model), "--context", "128", "--port", "0", "--chat-format"]
    done = CliRunner().invoke(app, [*command, "functionary-v2"])
    assert "format functionary-v2 makes no prompt here" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "no-such"])
    assert "'no-such' is no chat format of llama-cpp-python; it knows" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key", ""], "is empty"),
        (["--allow-host", "a*b"], "--allow-host 'a*b' is no host"),
        (["--allow-origin", "https://x.org/page"], "is no origin"),
    ],
)
def test_access_that_nobody_could_have_is_an_error_before_the_model_is_loaded(
    options: Sequence[str], said: str, model: Path
) -> None:
    assert said in str(CliRunner().invoke(app, ["serve", str(model), *options]).exception)


def test_an_empty_variable_is_no_open_server(model: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(model)], env={"RAMGGUF_API_KEY": ""})
    assert "the key of --api-key or RAMGGUF_API_KEY is empty" in str(done.exception)


def test_kernels_and_context_are_imposed_where_llama_cpp_python_has_no_setting() -> None:
    loads: list[Any] = []
    contexts: list[Any] = []
    functions = SimpleNamespace(
        llama_model_load_from_file=lambda path, parameters: loads.append(parameters),
        llama_init_from_model=lambda model, parameters: contexts.append(parameters),
    )
    llama: Any = SimpleNamespace(
        llama_cpp=functions,
        llama_context_default_params=lambda: SimpleNamespace(flash_attn_type=-1, swa_full=True),
    )
    request = Serve(
        path="m", alias="m", host="h", port=0, api_key=None, n_ctx=77, n_threads=3, type_k="Q8_0",
        type_v="F16", chat_format=None, safe_kernels=True, verbose=False, sample_text="",
        growth_bytes=1,
    )  # fmt: skip
    engine_server.impose(llama, request)
    functions.llama_model_load_from_file(b"m", SimpleNamespace(use_extra_bufts=True))
    functions.llama_init_from_model(None, SimpleNamespace(flash_attn_type=0))
    assert loads[0].use_extra_bufts is False
    (made,) = contexts
    assert (made.n_ctx, made.n_threads, made.n_threads_batch) == (77, 3, 3)
    assert (made.type_k, made.type_v) == (8, 1)
    assert (made.flash_attn_type, made.swa_full) == (-1, False)


def test_other_machines_are_warned_of() -> None:
    settings = SimpleNamespace(
        shape=ContextShape(64),
        checked=None,
        n_threads=1,
        chat_format=None,
        needed=1,
        needed_by="estimate",
        n_ctx_train=32,
    )
    server: Any = SimpleNamespace(
        settings=settings, place=Place(host="0.0.0.0"), safe_kernels=False, url="http://[::1]:1/v1"
    )
    assert "other machines may ask, without a key: see --api-key" in conditions(server)
    assert conditions(server).startswith("context 64 (trained for 32), cache")
    assert "curl 'http://[::1]:1/v1/chat/completions'" in curl(server)
