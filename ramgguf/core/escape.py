"""What a file says of itself, made safe to show: on a terminal, in JSON, Markdown, HTML, a shell.

Names and texts come from strangers' files. Whatever could control a terminal, turn the direction of
what follows, or hide (controls, bidirectional and zero-width characters, lone surrogates) is shown
as an escape everywhere; markup is shown as text.
"""

import html
import json
import re
import shlex
from typing import Any

# Letters and marks that take no room, beside those of category Cf: Unicode's
# Default_Ignorable_Code_Point (DerivedCoreProperties.txt). str.isprintable lets them pass.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~&$])")
# What Markdown makes a mention or a link of without any markup. A comment in between ends that.
_MENTION = re.compile(r"(?<![A-Za-z0-9_])@|@(?=[\w-]+\\?\.)")
_ADDRESS = re.compile(r"(?<=http:)(?=//)|(?<=https:)(?=//)|(?<=ftp:)(?=//)|(?<=www)(?=\.)", re.I)
_COMMENT = "<!-- -->"


def is_shown(text: str) -> bool:
    """Return whether all of the text is visible, and none of it controls how the rest is shown."""
    return text.isprintable() and (text.isascii() or _INVISIBLE.search(text) is None)


def printable(text: str) -> str:
    """Return the text on one line, with escapes for what would control a terminal, or hide."""
    if is_shown(text):
        return text
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return the text with its lines as they are, each of them printable."""
    return "\n".join(printable(line) for line in text.split("\n"))


def html_text(text: str) -> str:
    """Return text for HTML, in an element or a quoted attribute; lines stay lines."""
    return html.escape(printable_lines(text.expandtabs(1)))


def markdown_text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: no markup, mention or link."""
    escaped = _MARKUP.sub(r"\\\1", printable(" ".join(text.split())))
    return _ADDRESS.sub(_COMMENT, _MENTION.sub(f"@{_COMMENT}", escaped))


def markdown_code(text: str) -> str:
    """Return text as inline code of Markdown, whatever it holds."""
    line = printable(" ".join(text.split()))
    fence = "`" * (longest_fence(line) + 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def longest_fence(text: str) -> int:
    """Return how many backticks follow each other at most: a fence around the text has more."""
    return max((len(run) for run in re.findall("`+", text)), default=0)


def yaml_text(text: str) -> str:
    """Return a quoted string of YAML; what is not shown is a space there."""
    return json.dumps("".join(c if is_shown(c) else " " for c in text), ensure_ascii=False)


def shell_word(text: str) -> str:
    """Return the text as a word of a POSIX shell; what is not shown is escaped, as in bash."""
    if is_shown(text):
        return shlex.quote(text)
    return "$'" + "".join(map(_shell_character, text)) + "'"


def _shell_character(c: str) -> str:
    if is_shown(c):
        return f"\\{c}" if c in "\\'" else c
    return "".join(f"\\x{b:02x}" for b in c.encode("utf-8", errors="surrogateescape"))


def json_text(text: str) -> str:
    r"""Return a JSON text, the same value, with what is not shown in strings as \uXXXX."""
    lines = text.split("\n")  # outside of strings there is nothing else that is not shown
    if all(map(is_shown, lines)):
        return text
    return "\n".join(
        line if is_shown(line) else "".join(map(_json_character, line)) for line in lines
    )


def _json_character(c: str) -> str:
    if is_shown(c):
        return c
    units = c.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def surrogates_escaped(value: Any) -> Any:
    """Return what JSON is made of, with lone surrogates in its strings written out: it is UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {surrogates_escaped(k): surrogates_escaped(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [surrogates_escaped(v) for v in value]
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that is safe to show; raises ValueError for NaN and infinity."""
    return json_text(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))
