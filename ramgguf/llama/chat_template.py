"""A chat as the model was trained to read it: rendered by the template in its own metadata."""

from collections.abc import Mapping, Sequence

from ramgguf.core.mix import Turn
from ramgguf.gguf.reader import GGUFFile

TEMPLATE = "tokenizer.chat_template"


def render(file: GGUFFile, turns: Sequence[Turn]) -> tuple[str, bool]:
    """Return the chat as text, and whether control tokens are written in it.

    Without a template, or with one that fails on plain turns, the roles are named in words.
    """
    template = file.metadata.string(TEMPLATE)
    if template:
        tokens = {
            f"{name}_token": _token(file, f"tokenizer.ggml.{name}_token_id")
            for name in ("bos", "eos")
        }
        rendered = _rendered(template, turns, tokens)
        if rendered:
            return rendered, True
    return "\n\n".join(f"{t.role.title()}: {t.content}" for t in turns) + "\n", False


def start(file: GGUFFile) -> str:
    """Return what the model's template puts before a user's first words; "" without a template."""
    mark = "FIRST-WORDS"
    rendered, has_template = render(file, [Turn(role="user", content=mark)])
    before, found, _ = rendered.partition(mark)
    return before if has_template and found else ""


def _rendered(template: str, turns: Sequence[Turn], tokens: Mapping[str, str]) -> str | None:
    """Return what the template makes of the turns; None where it, or its engine, refuses."""
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": t.role, "content": t.content} for t in turns]

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    try:
        return environment.from_string(template).render(
            messages=messages,
            add_generation_prompt=False,
            raise_exception=raise_exception,
            strftime_now=lambda _: "1 January 2025",
            **tokens,
        )
    # A template is the model's code: whatever it raises, this chat has no rendering.
    except Exception:
        return None


def _token(file: GGUFFile, key: str) -> str:
    """Return the text of a special token, "" where the model has none."""
    number, tokens = file.metadata.integer(key), file.metadata.get("tokenizer.ggml.tokens")
    if number is None or not isinstance(tokens, Sequence) or not 0 <= number < len(tokens):
        return ""
    return str(tokens[number])
