"""Chats as the model was trained to read them: rendered by the template in its own metadata.

A template is a program. It runs in a child process: Jinja's sandbox keeps it from files and the
interpreter's insides, and limits keep it from all of the machine's time and memory.
"""

import resource
import subprocess
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.core.mix import Turn
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.child import PYTHON, take_stdout
from ramgguf.llama.limits import cap_growth

TEMPLATE = "tokenizer.chat_template"
_MOST_TOKENS = 1 << 24  # many times any vocabulary
GROWTH_BYTES = 128 << 20
CPU_SECONDS = 10  # of all chats; of the CPU, so that a busy machine renders what an idle one does
_WALL_SECONDS = 300  # for one that waits
_LONGEST = 1 << 20  # characters of a chat
_SHOWN = 300  # characters of what a template raises

Rendered = tuple[str, bool]


class Chats(FrozenModel):
    """Render these turns, given by role and content, with the template.

    opens_answer: with what the template puts before the model's next words.
    """

    template: str
    tokens: dict[str, str]
    chats: tuple[tuple[tuple[str, str], ...], ...]
    opens_answer: bool = False


class RenderedChats(FrozenModel):
    """The text of each chat, None where the template makes none; why, of the first of these."""

    texts: tuple[str | None, ...]
    why: str = ""


def render(file: GGUFFile, chats: Sequence[Sequence[Turn]]) -> list[Rendered]:
    """Return each chat as text, and whether control tokens are written in it.

    Without a template, or with one that fails on plain turns, the roles are named in words.
    """
    texts: Sequence[str | None] = [None] * len(chats)
    template = file.metadata.string(TEMPLATE)
    if template and chats:
        tokens = {
            f"{name}_token": _token(file, f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos")
        }
        turns = tuple(tuple((t.role, t.content) for t in chat) for chat in chats)
        found = _by_child(Chats(template=template, tokens=tokens, chats=turns))
        texts = texts if found is None else found.texts
    return [
        (text, True) if text else (_in_words(chat), False)
        for text, chat in zip(texts, chats, strict=True)
    ]


def start(file: GGUFFile) -> str:
    """Return what the model's template puts before a user's first words; "" without a template."""
    mark = "FIRST-WORDS"
    rendered, has_template = render(file, [[Turn(role="user", content=mark)]])[0]
    before, found, _ = rendered.partition(mark)
    return before if has_template and found else ""


def questions(template: str, bos: str, eos: str, texts: Sequence[str]) -> list[str]:
    """Return users' messages as the template puts each alone, with what opens the answer.

    Raises EngineError that says what the template does wrong.
    """
    request = Chats(
        template=template,
        tokens={"bos_token": bos, "eos_token": eos},
        chats=tuple((("user", text),) for text in texts),
        opens_answer=True,
    )
    found = _by_child(request)
    if found is None:
        raise EngineError(
            f"the file's chat template fails: its process was ended, at {CPU_SECONDS} s of the CPU "
            f"or {GROWTH_BYTES >> 20} MiB of memory"
        )
    whole = [text for text in found.texts if text is not None]
    if len(whole) < len(texts):
        raise EngineError(f"the file's chat template fails: {found.why}")
    return whole


def _in_words(chat: Sequence[Turn]) -> str:
    return "\n\n".join(f"{t.role.title()}: {t.content}" for t in chat) + "\n"


def _by_child(request: Chats) -> RenderedChats | None:
    """Return what the template makes of the chats; None where it ends its process."""
    try:
        done = subprocess.run(
            [*PYTHON, "-c", f"from {__name__} import main; main()"],
            input=request.model_dump_json().encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_SECONDS,
            start_new_session=True,  # Ctrl-C is for the command
            check=False,
        )
        found = RenderedChats.model_validate_json(done.stdout)
    except (subprocess.TimeoutExpired, ValidationError):
        return None
    return found if len(found.texts) == len(request.chats) else None


def rendered(request: Chats) -> RenderedChats:
    """Return what the template makes of each chat; a chat on which it fails has no text."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return RenderedChats(texts=(None,) * len(request.chats), why="jinja2 is missing")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    texts: list[str | None] = []
    why = ""
    for chat in request.chats:
        try:
            text = environment.from_string(request.template).render(
                messages=[{"role": role, "content": content} for role, content in chat],
                add_generation_prompt=request.opens_answer,
                raise_exception=raise_exception,
                strftime_now=lambda _: "1 January 2025",
                **request.tokens,
            )
            text.encode()  # a lone surrogate is no text
            if len(text) > _LONGEST:
                raise ValueError(f"{len(text)} characters, {_LONGEST} at most")
            texts.append(text)
        # A template is the model's code: whatever it raises, this chat has no rendering.
        except Exception as e:
            texts.append(None)
            why = why or f"{type(e).__name__}: {str(e)[:_SHOWN]}"
    return RenderedChats(texts=tuple(texts), why=why.encode(errors="replace").decode())


def main() -> None:
    """Answer the request on stdin."""
    out = take_stdout()
    request = Chats.model_validate_json(sys.stdin.buffer.read())
    cap_growth(GROWTH_BYTES)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out.write(rendered(request).model_dump_json())
    out.flush()


def _token(file: GGUFFile, key: str) -> str:
    """Return the text of a special token, "" where the model has none."""
    number = file.metadata.integer(key)
    if number is None or not 0 <= number < _MOST_TOKENS:
        return ""
    tokens = file.metadata.strings("tokenizer.ggml.tokens", number + 1) or ()
    return tokens[number] if number < len(tokens) else ""


if __name__ == "__main__":
    main()
