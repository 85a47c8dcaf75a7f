"""The one layer between what files say of themselves and what people and programs are shown."""

import html
import json
import shlex
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile_text import HOSTILE, hidden
from ramgguf.core import escape

TEXTS = st.one_of(
    st.text(max_size=30), st.text(st.sampled_from(HOSTILE + "a `'\"\\@/:."), max_size=9)
)


@given(TEXTS)
def test_nothing_hidden_passes(text: str) -> None:
    for shown in (
        escape.printable(text),
        escape.printable_lines(text),
        escape.markdown_text(text),
        escape.markdown_code(text),
        escape.html_text(text),
        escape.shell_word(text),
        escape.yaml_text(text),
        escape.to_json({"name": text}, indent=1),
    ):
        assert not hidden(shown), ascii(shown)


@given(TEXTS)
def test_what_is_escaped_is_the_same_value(text: str) -> None:
    assert json.loads(escape.to_json([text])) == [text]
    visible = "".join(c for c in text if escape.is_shown(c))
    assert escape.printable(visible) == visible
    assert html.unescape(escape.html_text(visible)) == visible
    assert shlex.split(escape.shell_word(visible)) == [visible]


def test_a_shell_gets_the_bytes_of_a_name_back() -> None:
    names = ["a'b\\c\u202e", "two\nlines", b"m\xff.gguf".decode(errors="surrogateescape")]
    for name in names:
        command = ["bash", "-c", f"printf %s {escape.shell_word(name)}"]
        done = subprocess.run(command, capture_output=True, check=True)
        assert done.stdout == name.encode(errors="surrogateescape")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@user", "@<!-- -->user"),
        ("(@org/team)", "(@<!-- -->org/team)"),
        ("me@example.org", "me@<!-- -->example.org"),
        ("https://example.org", "https:<!-- -->//example.org"),
        ("www.example.org", "www<!-- -->.example.org"),
        ("[x](javascript:y)", r"\[x\](javascript:y)"),
        ("hf://org/repo@abc/file.gguf", "hf://org/repo@abc/file.gguf"),
    ],
)
def test_markdown_makes_no_mention_and_no_link(text: str, expected: str) -> None:
    assert escape.markdown_text(text) == expected
