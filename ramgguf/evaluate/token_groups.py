"""Where in a sequence KLD and equal top tokens fall: by position, by class of token, the worst.

A token's position is the number of tokens of its window's text before it; what a protocol puts in
front of the text (BOS, the start of a chat template) does not count. Its class is what its own
text is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ramgguf.evaluate.result import (
    FIRST_TOKENS,
    EvalResult,
    SequenceScore,
    TokenSums,
    WorstToken,
)

IntArray = npt.NDArray[np.int64]

# The first that matches the whole text of a token names its class. Append only: results hold sums
# in this order. "piece": bytes that are no whole character.
TOKEN_CLASSES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("whitespace", re.compile(r"\s+")),
    ("number", re.compile(r"\s*\d[\d.,]*\s*")),
    ("word", re.compile(r"\s+[^\W\d_]+(['’][^\W\d_]*)?|[^\W\d_]*['’][^\W\d_]+")),
    ("word, continued", re.compile(r"[^\W\d_]+")),
    ("punctuation", re.compile(r"\s*[.,;:!?'\"()«»„“”‘’…–—¿¡、。-]+\s*")),
    ("code", re.compile(r"(?s).*[{}\[\]<>=+*/\\|&^$#@~`_%()].*")),
    ("piece", re.compile("(?s).*�.*")),
    ("other", re.compile(r"(?s).*")),
)
_WORST = 4  # tokens of a sequence that are named
_BEFORE = 60  # bytes of text shown before one


def class_of(text: str) -> int:
    """Return the number of the token's class in TOKEN_CLASSES."""
    return next(i for i, (_, pattern) in enumerate(TOKEN_CLASSES) if pattern.fullmatch(text))


def position_group(positions: IntArray) -> IntArray:
    """Return the group of each position: 0 of position 0, k of 2^(k−1) … 2^k − 1."""
    return np.asarray(np.frexp(positions.astype(np.float64))[1], dtype=np.int64)


def group_start(group: int) -> int:
    """Return the first position of a group."""
    return 0 if group == 0 else 1 << (group - 1)


def group_label(group: int) -> str:
    """Return the positions of a group: 0, 1, 2–3, 4–7 …"""
    last = (1 << group) - 1
    return str(last) if group < 2 else f"{group_start(group)}–{last}"


@dataclass(frozen=True, eq=False)
class TokenFigures:
    """What is known of each scored token of a sequence; texts has a text per token.

    reference_nll is None where the reference's own losses were not kept.
    """

    positions: IntArray
    texts: Sequence[bytes]
    kld: npt.NDArray[np.float64]
    same_top: npt.NDArray[np.bool_]
    nll: npt.NDArray[np.float64]
    reference_nll: npt.NDArray[np.float64] | None

    def by_position(self) -> TokenSums:
        """Return the sums of every group of positions."""
        return self._sums(position_group(self.positions), None)

    def by_class(self) -> TokenSums:
        """Return the sums of every class."""
        known = {text: class_of(text.decode("utf-8", "replace")) for text in set(self.texts)}
        groups = np.array([known[text] for text in self.texts], dtype=np.int64)
        return self._sums(groups, len(TOKEN_CLASSES))

    def worst(self) -> tuple[WorstToken, ...]:
        """Return the tokens of the largest KLD, worst first; the window's first are left out."""
        order = np.argsort(-self.kld, kind="stable")
        late = [int(i) for i in order if self.positions[i] >= FIRST_TOKENS][:_WORST]
        return tuple(self._worst(i) for i in late if self.kld[i] > 0)

    def _sums(self, groups: IntArray, n_groups: int | None) -> TokenSums:
        n = n_groups or int(groups.max()) + 1
        return TokenSums(
            n=tuple(int(x) for x in np.bincount(groups, minlength=n)),
            kld_sum=tuple(float(x) for x in np.bincount(groups, self.kld, minlength=n)),
            n_same_top=tuple(int(x) for x in np.bincount(groups, self.same_top, minlength=n)),
        )

    def _worst(self, i: int) -> WorstToken:
        before = b"".join(self.texts[max(0, i - _BEFORE) : i])[-_BEFORE:]
        return WorstToken(
            position=int(self.positions[i]),
            text=self.texts[i].decode("utf-8", "replace"),
            before=before.decode("utf-8", "ignore"),
            kld=float(self.kld[i]),
            nll=float(self.nll[i]),
            reference_nll=None if self.reference_nll is None else float(self.reference_nll[i]),
        )


def first_sums(score: SequenceScore) -> tuple[int, float] | None:
    """Return how many of the first tokens of a window were scored, and their KLD in nats."""
    if score.by_position is None:
        return None
    n = FIRST_TOKENS.bit_length()
    return sum(score.by_position.n[:n]), sum(score.by_position.kld_sum[:n])


def total(sums: Sequence[TokenSums]) -> TokenSums:
    """Return the sums of all groups over sequences, as many groups as any of them has."""
    length = max((len(s.n) for s in sums), default=0)

    def add(rows: list[Sequence[float]]) -> list[float]:
        return [sum(row[k] for row in rows if k < len(row)) for k in range(length)]

    return TokenSums(
        n=tuple(int(x) for x in add([s.n for s in sums])),
        kld_sum=tuple(add([s.kld_sum for s in sums])),
        n_same_top=tuple(int(x) for x in add([s.n_same_top for s in sums])),
    )


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of one group of a result: their share of all KLD, mean KLD (nats), same top (%)."""

    label: str
    n: int
    share: float
    kld: float
    same_top_p: float


def _groups(sums: Sequence[TokenSums | None], labels: Sequence[str] | None) -> list[TokenGroup]:
    known = [s for s in sums if s is not None]
    if not known or len(known) != len(sums):
        return []
    found = total(known)
    whole = sum(found.kld_sum) or 1.0
    return [
        TokenGroup(
            group_label(k) if labels is None else labels[k],
            n,
            found.kld_sum[k] / whole,
            found.kld_sum[k] / n,
            100 * found.n_same_top[k] / n,
        )
        for k, n in enumerate(found.n)
        if n
    ]


def by_position(result: EvalResult) -> list[TokenGroup]:
    """Return the groups of positions in the window; empty where they are not known."""
    return _groups([s.by_position for s in result.sequences], None)


def by_class(result: EvalResult) -> list[TokenGroup]:
    """Return the classes of tokens, in the order of TOKEN_CLASSES; empty where not known."""
    return _groups([s.by_class for s in result.sequences], [name for name, _ in TOKEN_CLASSES])


def worst_tokens(result: EvalResult, n: int) -> list[tuple[SequenceScore, WorstToken]]:
    """Return the n tokens of the largest KLD with their sequences, at most four of each."""
    found = [(s, w) for s in result.sequences for w in s.worst_tokens]
    return sorted(found, key=lambda x: -x[1].kld)[:n]
