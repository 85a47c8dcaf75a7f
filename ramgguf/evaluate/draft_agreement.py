"""How often a draft model proposes what a model says, before and after the model was quantized.

On held-out text, at every token, the draft's most probable next token is compared with the model's
own. With greedy sampling, a drafted token is accepted exactly where the two are the same; the text
here is not the model's, so that the share of the quantized file is to be read beside the source's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ramgguf.core.progress import Progress
from ramgguf.evaluate.held_out import HeldOutScore, resamples, score_held_out
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.statistics import MIN_UNITS

SECONDS = 20.0
N_CTX = 128  # short windows: many of them fit the seconds
NOTABLE = 0.05


@dataclass(frozen=True)
class DraftAgreement:
    """Shares of tokens at which the draft's most probable token is the model's, over n_tokens.

    change is the quantized file's share less the source's, with an interval over the same windows.
    """

    draft: str
    n_tokens: int
    source: Estimate
    quantized: Estimate
    change: Estimate

    @property
    def is_worse(self) -> bool:
        """Whether notably fewer drafts of the quantized file are accepted.

        That is a loss of NOTABLE of the source's share, and not one that chance explains.
        """
        is_large = self.change.value <= -NOTABLE * self.source.value
        return is_large and (self.change.high is None or self.change.high < 0)

    @classmethod
    def of(cls, draft: Path, source: HeldOutScore, quantized: HeldOutScore) -> "DraftAgreement":
        """Return that of two scores against the draft, on the same windows."""
        change = _change(source, quantized)
        one, other = source.overall(), quantized.overall()
        return cls(str(draft), one.n_tokens, one.same_top, other.same_top, change)


def draft_agreement(
    draft: Path,
    source: Path,
    quantized: Path,
    *,
    seconds: float = SECONDS,
    threads: int | None = None,
    progress: Progress | None = None,
) -> DraftAgreement:
    """Return how often the draft agrees with the source and with the quantized file.

    The three are in memory together. Raises EngineError where llama.cpp is missing or fails, or
    the draft has another tokenizer.
    """
    one, other = score_held_out(
        [source, quantized], draft, n_ctx=N_CTX, seconds=seconds, threads=threads,
        progress=progress,
    )  # fmt: skip
    return DraftAgreement.of(draft, one, other)


def _change(source: HeldOutScore, quantized: HeldOutScore) -> Estimate:
    sums = np.array(
        [
            (a.n_tokens, b.n_same_top - a.n_same_top)
            for a, b in zip(source.windows, quantized.windows, strict=True)
        ],
        np.float64,
    )
    n, changed = sums.sum(0)
    value = float(changed / n)
    if len(sums) < MIN_UNITS:
        return Estimate(value)
    drawn = resamples([w.domain for w in source.windows]) @ sums
    low, high = np.quantile(drawn[:, 1] / drawn[:, 0], (0.025, 0.975))
    return Estimate(value, float(low), float(high))
