"""Chats by the template of a file: in a process of their own, with limits, or in words."""

import time
from pathlib import Path

import pytest

from bigram_model import write_bigram_model
from ramgguf.core.mix import Turn
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import chat_template
from ramgguf.llama.chat_template import Chats, render, rendered

pytest.importorskip("jinja2")

TURNS = [Turn("user", "hi"), Turn("assistant", "yes")]
IN_WORDS = "User: hi\n\nAssistant: yes\n"
PLAIN = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{{ eos_token }}"


def _rendered(template: str) -> str | None:
    turns = tuple((t.role, t.content) for t in TURNS)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (text,) = rendered(Chats(template=template, tokens=tokens, chats=(turns,))).texts
    return text


def test_a_template_sees_turns_and_special_tokens() -> None:
    assert _rendered(PLAIN) == "[hi][yes]</s>"
    assert _rendered("{{ strftime_now('%Y') }}") == "1 January 2025"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('x') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for %}",
        "{{ 'x' * 1048577 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '\ud800' }}",
    ],
)
def test_a_template_that_does_wrong_makes_no_text(template: str) -> None:
    assert _rendered(template) is None


def test_chats_of_a_file_are_rendered_one_by_one(tmp_path: Path) -> None:
    failing = "{% if messages|length < 2 %}{{ raise_exception('x') }}{% endif %}" + PLAIN
    path = write_bigram_model(tmp_path / "m.gguf", template=failing)
    with open_gguf(path) as file:
        (text, special), alone = render(file, [TURNS, TURNS[:1]])
        assert render(file, []) == []
    assert text.startswith("[hi][yes]")
    assert special
    assert alone == ("User: hi\n", False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('x' * 8000000000) | length }}",  # a constant: computed when it is compiled
        "{% set n = namespace(x='x') %}{% for a in range(40) %}{% set n.x = n.x * 2 %}{% endfor %}",
        None,
    ],
)
def test_a_template_that_takes_all_is_ended_and_the_roles_are_named_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    path = write_bigram_model(tmp_path / "m.gguf", template=template)
    started = time.monotonic()
    # The child takes its limits from the module: what is passed on is the wait.
    monkeypatch.setattr(chat_template, "_WALL_SECONDS", 5)
    with open_gguf(path) as file:
        assert render(file, [TURNS]) == [(IN_WORDS, False)]
    assert time.monotonic() - started < 60
