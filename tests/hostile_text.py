"""Characters that control what shows them, or hide, and whether any is in a text as it is."""

import unicodedata

# Control, C1, bidirectional, zero-width, line separators, tags, fillers, a private one, a BOM.
HOSTILE = (
    "\x00\x07\x08\x1b\x7f\x85\x9b\u00ad\u034f\u061c\u115f\u180b\u180e\u200b\u200d\u200e\u2028"
    "\u2029\u202a\u202e\u2060\u2066\u2069\u3164\ue000\ufe0f\ufeff\uffa0\U000e0001\U000e0100"
)
_INVISIBLE_LETTERS = "\u034f\u115f\u180b\u3164\ufe0f\uffa0\U000e0100"
_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def hidden(text: str) -> str:
    """Return what is in the text, lines aside, that a reader would not see as it is."""
    return "".join(
        c
        for c in text
        if c != "\n" and (unicodedata.category(c) in _CATEGORIES or c in _INVISIBLE_LETTERS)
    )
