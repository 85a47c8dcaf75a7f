"""Plans for users of llama-quantize: the lines of its --tensor-type-file.

llama-quantize (tools/quantize/quantize.cpp) splits that file at white space and each word at its
first `=`, lowers the letters of the name, and takes it for a regular expression (std::regex, found
anywhere in a tensor's name); the type is a ggml type in either case. The first match counts. A
tensor that none matches gets what the base type's mix gives it, so that the base is Q8_0.
"""

import re
import string
from collections.abc import Iterable

from ramgguf.gguf.architecture import HEAD, NEVER_QUANTIZED, TOKEN_EMBEDDING
from ramgguf.plan.recipes import Recipe
from ramgguf.plan.result import Plan

# What llama-quantize makes with --imatrix only (tools/quantize and llama-quant.cpp).
NEEDING_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ2_S", "IQ1_M")

_PLAIN = frozenset(string.ascii_lowercase + string.digits + "_")
# llama.cpp makes these of any type without an importance matrix.
_EXEMPT = tuple(f"^{re.escape(name)}$" for name in (TOKEN_EMBEDDING, HEAD))


def tensor_types(plan: Plan) -> str:
    """Return the plan as lines for `llama-quantize --tensor-type-file … MODEL OUT Q8_0`.

    Each names one tensor. Tensors that llama-quantize leaves alone by itself stay out.
    """
    chosen = (a for a in plan.assignments if a.note not in NEVER_QUANTIZED)
    return _lines((a.name, a.format) for a in chosen)


def recipe_types(recipe: Recipe) -> str:
    """Return a recipe's tensors, all but those of one dimension, as tensor_types does."""
    chosen = (t for t in recipe.tensors if t.shape is None or len(t.shape) > 1)
    return _lines((t.name, t.format) for t in chosen)


def imatrix_note(types: str) -> str | None:
    """Return what llama-quantize will ask for besides these lines, None if nothing."""
    words = (word.partition("=") for word in types.split())
    made = {name.upper() for pattern, _, name in words if pattern not in _EXEMPT}
    needing = [name for name in NEEDING_IMATRIX if name in made]
    if not needing:
        return None
    return f"llama-quantize makes {', '.join(needing)} with --imatrix only"


def _lines(formats: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{_pattern(name)}={to.lower()}\n" for name, to in formats)


def _pattern(name: str) -> str:
    """Return an anchored pattern for the name; `.` stands for what llama-quantize would change."""
    return f"^{''.join(map(_character, name))}$"


def _character(c: str) -> str:
    if c in _PLAIN:
        return c
    return r"\." if c == "." else "." * len(c.encode())
