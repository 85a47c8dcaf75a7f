"""Whether a step is taken: a file before it and one after it, on the same held-out windows.

A step must lower the KLD over all domains, and raise that of none beyond what chance does: a matrix
from one kind of text can make another worse than no matrix at all.
"""

import math
from dataclasses import dataclass

import numpy as np

from ramgguf.evaluate import HeldOutScore

# A domain is worse if its paired difference is above so many standard errors, and above SLACK.
Z = 2.0
SLACK = 0.02
MIN_WINDOWS = 3  # of a domain, to know a standard error; with fewer it may not be worse at all


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
        told = (
            f"KLD × {self.ratio:.3f} on {self.n_windows} held-out windows "
            f"(worst domain: {domain} × {self.ratios[domain]:.3f})"
        )
        if self.taken:
            return f"taken: {told}"
        why = f"{', '.join(self.worse)} gets worse" if self.worse else "it does not lower the KLD"
        return f"not taken, {why}: {told}"


def judge(before: HeldOutScore, after: HeldOutScore) -> Verdict:
    """Return the verdict on two scores of the same windows, as far as both go."""
    ratios, worse = {}, []
    n_windows = min(len(before.windows), len(after.windows))
    for domain in before.domains:
        a, b = (
            np.array(
                [w.kld_sum / w.n_tokens for w in score.windows[:n_windows] if w.domain == domain]
            )
            for score in (before, after)
        )
        difference = b - a
        mean = float(difference.mean())
        least = float(a.mean())
        ratios[domain] = float(b.mean()) / least if least > 0 else math.inf
        slack = SLACK * least
        if len(a) >= MIN_WINDOWS:
            slack = max(slack, Z * float(difference.std(ddof=1)) / math.sqrt(len(a)))
        if mean > slack:
            worse.append(domain)
    logs = [math.log(max(r, 1e-9)) if math.isfinite(r) else 1.0 for r in ratios.values()]
    return Verdict(math.exp(sum(logs) / len(logs)), ratios, tuple(worse), n_windows)
