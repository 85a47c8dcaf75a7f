"""Signs that a model has collapsed, in its answers. They find broken models, not small losses.

The bounds lie far from what working models show: docs/check.md has the measured values.
"""

import math
from collections import Counter
from collections.abc import Sequence

from ramgguf.llama.trial_protocol import Asked

# A plain paragraph. Any model that knows English finds it likely, whatever its size.
KNOWN_TEXT = (
    "When the sun warms the sea, some of the water turns into vapor and rises into the air. High "
    "above the ground the air is cold, and the vapor becomes small drops that we see as clouds. "
    "The wind carries the clouds over the land. When the drops grow heavy enough, they fall as "
    "rain or snow. Part of the rain sinks into the earth and feeds the springs; the rest runs down "
    "the hills in streams. The streams meet and become rivers, and the rivers bring the water back "
    "to the sea, where the journey begins again. People have watched this cycle for thousands of "
    "years. Farmers wait for the rain in spring, and towns store it behind dams for the dry months "
    "of summer. Without it there would be no fields, no forests and no food."
)

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a fox who learns to count.",
    "List five things to pack for a walk in the mountains.",
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
)

# The paragraph's perplexity per token: working models show 5 to 60, broken ones 100s to 1000s.
WORST_KNOWN_PPL = 200.0
# How much more surprising the reference finds an answer than its own, in nats per token.
WORST_SURPRISE = 2.0

_LEAST_BYTES = 2
_GRAM = 4
_LEAST_GRAMS = 24
_LEAST_DISTINCT = 0.25
_MOST_OF_ONE_TOKEN = 0.5


def signs(answer: Asked) -> tuple[str, ...]:
    """Return what is wrong with an answer by itself: empty, repetitive, or no text at all."""
    text = bytes.fromhex(answer.text_hex)
    if len(text.strip()) < _LEAST_BYTES:
        return ("empty",)
    found = []
    if not _is_utf8(text, cut=not answer.ended):
        found.append("invalid UTF-8")
    if (share := distinct_share(answer.ids)) is not None and share < _LEAST_DISTINCT:
        found.append(f"repetitive: {share:.0%} of its sequences of {_GRAM} tokens are distinct")
    token, n = Counter(answer.ids).most_common(1)[0]
    if len(answer.ids) >= _LEAST_GRAMS and n > _MOST_OF_ONE_TOKEN * len(answer.ids):
        found.append(f"one token (id {token}) is {n / len(answer.ids):.0%} of it")
    return tuple(found)


def distinct_share(ids: Sequence[int]) -> float | None:
    """Return which share of the sequences of four tokens are distinct; None of too few tokens."""
    grams = [tuple(ids[i : i + _GRAM]) for i in range(len(ids) - _GRAM + 1)]
    return len(set(grams)) / len(grams) if len(grams) >= _LEAST_GRAMS else None


def _is_utf8(text: bytes, *, cut: bool) -> bool:
    """Return whether the bytes are UTF-8; a text that was cut may end within a character."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as e:
        return cut and e.reason == "unexpected end of data" and e.end == len(text)
    return True


def perplexity(nll: float | None, n_tokens: int) -> float:
    """Return exp(mean NLL); infinite where there is none."""
    return math.exp(min(700.0, nll / n_tokens)) if nll is not None and n_tokens else math.inf
