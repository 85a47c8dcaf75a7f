"""Whether a step is taken: the file before it and that after it, on the same held-out windows.

A step must lower the KLD over all domains, and raise that of none beyond what chance does: a matrix
from one kind of text can make another worse than no matrix at all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_count
from ramgguf.evaluate import HeldOutScore, score_held_out
from ramgguf.gguf.reader import open_gguf
from ramgguf.quantize.candidate import Candidate
from ramgguf.quantize.schedule import GATE_CTX
from ramgguf.quants.decoded import write_decoded

Floats = NDArray[np.float64]

# A domain is worse if its paired difference is above so many standard errors, and above SLACK.
Z = 2.0
SLACK = 0.02
MIN_WINDOWS = 3  # of a domain, to know its own standard error; two have that of all domains
FIRST_CTX, FIRST_ROUNDS = 16, 6  # the windows that show what becomes of first tokens


@dataclass(frozen=True)
class Verdict:
    """Whether the file after a step is better: ratios of its KLD to that before, by domain.

    ratio is their geometric mean; worse names the domains that the step makes worse.
    """

    ratio: float
    ratios: dict[str, float]
    worse: tuple[str, ...]
    n_windows: int

    @property
    def taken(self) -> bool:
        return self.ratio < 1 and not self.worse

    @property
    def harmless(self) -> bool:
        """Whether the file after it is as good, by what chance and SLACK allow."""
        return self.ratio < 1 + SLACK and not self.worse

    def __str__(self) -> str:
        domain = max(self.ratios, key=lambda d: self.ratios[d])
        summary = (
            f"KLD × {self.ratio:.3f} on {format_count(self.n_windows, 'held-out window')} (worst "
            f"domain: {domain} × {self.ratios[domain]:.3f})"
        )
        if self.taken:
            return f"taken: {summary}"
        why = f"{', '.join(self.worse)} gets worse" if self.worse else "it does not lower the KLD"
        return f"not taken, {why}: {summary}"


def judge(before: HeldOutScore, after: HeldOutScore) -> Verdict:
    """Return the verdict on two scores of the same windows, as far as both go."""
    ratios, worse = {}, []
    n_windows = min(len(before.windows), len(after.windows))
    pairs = {
        domain: tuple(
            np.array(
                [w.kld_sum / w.n_tokens for w in score.windows[:n_windows] if w.domain == domain]
            )
            for score in (before, after)
        )
        for domain in before.domains
    }
    pooled = _pooled_spread(list(pairs.values()))
    for domain, (a, b) in pairs.items():
        difference = b - a
        least = float(a.mean())
        ratios[domain] = float(b.mean()) / least if least > 0 else math.inf
        own = float(difference.std(ddof=1)) if len(a) >= MIN_WINDOWS else pooled * least
        slack = max(SLACK * least, Z * own / math.sqrt(len(a)))
        if float(difference.mean()) > slack:
            worse.append(domain)
    logs = [math.log(max(r, 1e-9)) if math.isfinite(r) else 1.0 for r in ratios.values()]
    return Verdict(math.exp(sum(logs) / len(logs)), ratios, tuple(worse), n_windows)


def _pooled_spread(pairs: Sequence[tuple[Floats, ...]]) -> float:
    """Return the standard deviation of paired differences within domains, each divided by the
    domain's KLD before; 0 where every domain has one window.
    """
    squares, freedom = 0.0, 0
    for a, b in pairs:
        if a.mean() > 0:
            shares = (b - a) / a.mean()
            squares += float(np.square(shares - shares.mean()).sum())
            freedom += len(a) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


@dataclass(frozen=True)
class Gate:
    """Scores candidates against the reference, which is the model or a stand-in for it.

    Where keeps_reference is set, the reference is read once: its logits are kept in the scratch
    folder. Where decodes is set, candidates are read decoded, in the model's types.
    """

    model: Path
    reference: Path
    scratch: Path
    keeps_reference: bool
    decodes: bool
    threads: int | None
    progress: Progress

    def verdict(self, best: Candidate, tried: Candidate, n_rounds: int) -> Verdict:
        """Return whether the candidate is better; the one before is scored once only."""
        unscored = [one for one in (best, tried) if one.score is None]
        found = score_held_out(
            [self._as_read(one) for one in unscored], self.reference, part="gate", n_ctx=GATE_CTX,
            seconds=None, max_rounds=n_rounds, threads=self.threads,
            reference_logits=self._kept_logits("gate"), progress=self.progress,
        )  # fmt: skip
        for one, score in zip(unscored, found, strict=True):
            one.score = score
        assert best.score is not None
        assert tried.score is not None
        return judge(best.score, tried.score)

    def on_first_tokens(self, best: Candidate, tried: Candidate) -> Verdict:
        """Return whether the first tokens of texts are better predicted."""
        before, after = score_held_out(
            [self._as_read(best), self._as_read(tried)], self.reference, part="gate",
            n_ctx=FIRST_CTX, first_target=1,
            seconds=None, max_rounds=FIRST_ROUNDS, threads=self.threads,
            reference_logits=self._kept_logits("first"), progress=self.progress,
        )  # fmt: skip
        return judge(before, after)

    def _as_read(self, candidate: Candidate) -> Path:
        """Return the file that is read: the candidate, or that decoded."""
        if not self.decodes:
            return candidate.path
        if candidate.decoded is None:
            path = candidate.path.with_suffix(".decoded.gguf")
            with open_gguf(candidate.path) as file, open_gguf(self.model) as source:
                write_decoded(
                    file, source, path, threads=self.threads or default_threads(),
                    progress=self.progress,
                )  # fmt: skip
            candidate.decoded = path
        return candidate.decoded

    def _kept_logits(self, name: str) -> Path | None:
        """Return where the reference's logits are kept, if they are."""
        return self.scratch / f"{name}.logits" if self.keeps_reference else None
