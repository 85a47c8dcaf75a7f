"""The server's children by themselves: requests to a stub model, grammars, chats as prompts."""

import contextlib
import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel

from ramgguf.core.errors import EngineError
from ramgguf.llama import grammar
from ramgguf.llama.chat import Renderer
from ramgguf.llama.server import Engine, chat_format, require_chat_format
from ramgguf.llama.server_protocol import (
    ChatFormat,
    CheckGrammar,
    Detokenize,
    Finished,
    Generate,
    Piece,
    Refused,
    Render,
    Text,
    Tokenize,
    Tokens,
)

pytest.importorskip("llama_cpp")

END = 9  # ends a text


class StubLlama:
    """In the place of llama-cpp-python's model: a byte is a token."""

    metadata: ClassVar[dict[str, str]] = {"tokenizer.chat_template": "{{ messages }}"}

    def __init__(self, *, bos: int = -1) -> None:
        self._bos = bos
        self._model = SimpleNamespace(vocab=None, token_get_text=lambda token: f"<{token}>")
        self.asked: dict[str, Any] = {}

    def n_vocab(self) -> int:
        return 256

    def token_bos(self) -> int:
        return self._bos

    def token_eos(self) -> int:
        return END

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        assert special
        if text == b"fails":
            raise RuntimeError("no\nmemory")
        return [*([self._bos] if add_bos and self._bos >= 0 else []), *text]

    def detokenize(self, tokens: list[int]) -> bytes:
        return bytes(tokens)

    def generate(self, *_: Any) -> Iterator[int]:
        yield from b"abcd"

    def create_completion(self, ids: list[int], **options: Any) -> Iterator[dict[str, Any]]:
        self.asked = options | {"ids": ids}
        n = 0
        for token in self.generate(ids):
            yield {"choices": [{"text": chr(token), "finish_reason": None}]}
            n += 1
            if n == options["max_tokens"]:
                break
        yield {"choices": [{"text": "", "finish_reason": "stop" if n == 4 else "length"}]}


def engine(model: StubLlama, n_ctx: int = 16) -> Engine:
    llama: Any = SimpleNamespace(llama_vocab_is_eog=lambda _, token: token == END)
    return Engine(llama, model, n_ctx)


def answers(
    request: Generate | Tokenize | Detokenize, model: StubLlama | None = None
) -> list[BaseModel]:
    found: list[BaseModel] = []
    engine(model or StubLlama()).answer(request, found.append)
    return found


def generate(prompt: str, **options: Any) -> Generate:
    return Generate(id=3, prompt=prompt, max_tokens=10).model_copy(update=options)


def test_a_text_comes_in_pieces_and_ends_with_its_numbers() -> None:
    *pieces, done = answers(generate("xy"))
    assert pieces == [Piece(id=3, text=c) for c in "abcd"]
    assert done == Finished(id=3, reason="stop", n_prompt=2, n_completion=4)
    assert answers(generate("xy", max_tokens=2))[-1] == Finished(
        id=3, reason="length", n_prompt=2, n_completion=2
    )


def test_an_answer_ends_with_the_context() -> None:
    model = StubLlama()
    answers(generate("x" * 14), model)
    assert model.asked["max_tokens"] == 2
    (refused,) = answers(generate("x" * 16))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.is_fault) == ("context_length_exceeded", False)
    assert "maximum context length is 16 tokens, however the prompt has 16" in refused.message


def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    model = StubLlama()
    answers(generate("x", sampling={"seed": 7}), model)
    assert model.asked["seed"] == 7
    seeds = set()
    for _ in range(8):
        answers(generate("x"), model)
        seeds.add(model.asked["seed"])
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 32 for seed in seeds)


def test_a_prompt_without_tokens_begins_with_bos_or_is_refused() -> None:
    model = StubLlama(bos=1)
    answers(generate("", add_special=False), model)
    assert model.asked["ids"] == [1]
    answers(generate("x"), model)
    assert model.asked["ids"] == [1, ord("x")]
    (refused,) = answers(generate(""))
    assert isinstance(refused, Refused)
    assert refused.message == "the prompt has no tokens"


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    for request in (
        Detokenize(id=3, tokens=(1, 256)),
        generate("x", sampling={"logit_bias": {"256": 1.0}}),
    ):
        (refused,) = answers(request)
        assert isinstance(refused, Refused)
        assert refused.message == "token 256 is none of the 256 of the vocabulary"
        assert not refused.is_fault


def test_texts_and_tokens_are_converted() -> None:
    assert answers(Tokenize(id=3, text="ab")) == [Tokens(id=3, tokens=(97, 98))]
    assert answers(Detokenize(id=3, tokens=(97, 255))) == [Text(id=3, text="a\ufffd")]


def test_what_llama_cpp_raises_is_a_fault_in_one_line() -> None:
    (refused,) = answers(Tokenize(id=3, text="fails"))
    assert refused == Refused(id=3, message="llama.cpp: RuntimeError: no", is_fault=True)


def test_a_cancelled_request_ends_and_the_next_is_answered() -> None:
    found: list[BaseModel] = []
    made = engine(StubLlama())

    def say(message: BaseModel) -> None:
        found.append(message)
        if isinstance(message, Piece) and message.id == 3:
            made.cancel(3)
            made.cancel(2)  # is over

    made.answer(generate("xy"), say)
    assert found[-1] == Finished(id=3, reason="cancelled", n_prompt=2, n_completion=1)
    made.answer(generate("xy", id=4), say)
    assert found[-1] == Finished(id=4, reason="stop", n_prompt=2, n_completion=4)


def test_a_chat_format_is_the_files_template_unless_one_is_named() -> None:
    model = StubLlama(bos=1)
    assert chat_format(model, None) == ChatFormat(
        name=None, template="{{ messages }}", bos_token="<1>", eos_token="<9>", eos_id=9
    )
    named = chat_format(StubLlama(), "chatml")
    assert (named.template, named.bos_token) == (None, "")
    require_chat_format("chatml")
    with pytest.raises(EngineError, match=r"it knows .*chatml"):
        require_chat_format("no such")


def _grammar(**options: Any) -> CheckGrammar:
    none = {"path": "", "grammar": None, "schema_text": None, "growth_bytes": 1}
    return CheckGrammar(**(none | options))


def test_a_schema_becomes_a_grammar_or_a_line() -> None:
    assert grammar.grammar_of(_grammar(grammar="root ::= x")).grammar == "root ::= x"
    made = grammar.grammar_of(_grammar(schema_text=json.dumps({"const": 7})))
    assert "root ::=" in made.grammar
    assert made.error is None
    for schema in ('{"$ref": "#/nowhere"}', '{"type": 5}', "[]", "{"):
        error = grammar.grammar_of(_grammar(schema_text=schema)).error
        assert error is not None
        assert error.startswith("the schema makes no grammar (")
        assert "\n" not in error


def test_a_grammar_of_more_bytes_than_may_be_is_not_parsed() -> None:
    error = grammar.grammar_of(_grammar(grammar="é" * (129 << 10))).error
    assert error == "the grammar has more than 262144 bytes"


def test_a_grammar_is_tried_on_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []

    class Token:
        id = 0

        def __mul__(self, n: int) -> Any:
            return lambda: [Token() for _ in range(n)]

    functions = SimpleNamespace(
        llama_sampler_init_grammar=lambda vocab, text, root: text != b"bad" and root == b"root",
        llama_vocab_n_tokens=lambda _: 5,
        llama_token_data=Token(),
        llama_token_data_array=lambda candidates, n, *_: tokens.extend(c.id for c in candidates),
        llama_sampler_apply=lambda *_: None,
    )
    llama: Any = SimpleNamespace(llama_cpp=functions)
    monkeypatch.setattr(ctypes, "byref", lambda x: x)
    assert grammar.tried(llama, None, "good").grammar == "good"
    assert tokens == [0, 1, 2, 3, 4]
    assert grammar.tried(llama, None, "bad").error == "llama.cpp cannot parse the grammar"


def _render(**options: Any) -> Render:
    hi = {"messages": [{"role": "user", "content": "hi"}], "tools": None, "tool_choice": None}
    return Render(**(hi | {"max_bytes": 100} | options))


def _renderer(template: str | None, name: str | None = None) -> Renderer:
    chat = ChatFormat(name=name, template=template, bos_token="<s>", eos_token="</s>", eos_id=2)
    return Renderer(chat)


def test_a_chat_is_rendered_by_the_template_or_a_named_format() -> None:
    made = _renderer("{{ bos_token }}{{ messages[0]['content'] }}|{{ tools }}")(_render())
    assert (made.prompt, made.stop, made.add_bos) == ("<s>hi|None", ("</s>",), False)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = _renderer("{{ tools[0]['function']['name'] }}")(
        _render(tools=tools, tool_choice="auto")
    )
    assert with_tools.prompt == "f"
    chatml = _renderer(None, "chatml")(_render())
    assert chatml.prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('a\nb') }}", "the chat template refuses: ValueError: a"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ x.y.z }}", "UndefinedError"),
        ("{{ 'x' * 101 }}", "a prompt of 101 bytes, more than 100"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_what_a_template_does_wrong_is_one_line(template: str, said: str) -> None:
    made = _renderer(template)(_render())
    assert made.error is not None
    assert said in made.error
    assert "\n" not in made.error


def test_a_named_format_has_no_place_for_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for name in ("chatml", "chatml-function-calling", "functionary"):
        for choice in ("auto", None):
            made = _renderer(None, name)(_render(tools=tools, tool_choice=choice, max_bytes=1000))
            assert made.error == (
                f"the chat format {name} takes no tools; the template of a file may"
            )
        plain = _renderer(None, name)(_render(max_bytes=1000))
        assert "hi" in plain.prompt
        none = _render(tools=tools, tool_choice="none", max_bytes=1000)
        assert _renderer(None, name)(none) == plain


def test_a_format_that_needs_another_tokenizer_makes_no_prompt() -> None:
    for name in ("functionary-v1", "functionary-v2"):
        assert _renderer(None, name)(_render()).error is not None


_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@contextlib.contextmanager
def _looping(cpu_seconds: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process for templates, with one that does not end."""
    code = f"from ramgguf.llama import chat; chat.CPU_SECONDS = {cpu_seconds}; chat.main()"
    chat = ChatFormat(name=None, template=_LOOP, bos_token="", eos_token="", eos_id=-1)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(chat.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"{}\n"
        process.stdin.write(_render().model_dump_json().encode() + b"\n")
        process.stdin.flush()
        try:
            yield process
        finally:
            process.kill()


def test_a_template_that_loops_ends_with_its_parent() -> None:
    with _looping(1000) as process:
        time.sleep(0.3)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0


def test_a_template_that_loops_ends_at_its_time_of_the_cpu() -> None:
    with _looping(1) as process:
        assert process.wait(60) == -signal.SIGXCPU


def test_a_template_that_is_none_cannot_be_compiled() -> None:
    with pytest.raises(Exception, match="Expected an expression"):
        _renderer("{% for %}")
