"""The linear relaxation of a knapsack for every capacity at once: its cost along convex hulls.

Groups' hulls joined in the order of what a byte buys give the least cost as a convex, piecewise
linear function of bytes. It is below the cost of every selection (Sinha and Zoltners, Operations
Research 27, 1979).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.plan.knapsack import Choice, hull

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Envelope:
    """The hulls of all groups: where each begins, and their segments by what a byte buys."""

    n_bytes: Floats
    cost: Floats
    group: NDArray[np.intp]
    longer: Floats
    cheaper: Floats

    @classmethod
    def of(cls, items: Sequence[Sequence[Choice]], allowed: Sequence[Sequence[int]]) -> "Envelope":
        """Return the hulls of the choices that are allowed."""
        starts, segments = [], []
        for g, (item, own) in enumerate(zip(items, allowed, strict=True)):
            choices = [item[j] for j in own]
            line = [choices[j] for j in hull(choices)]
            starts.append((line[0].n_bytes, line[0].cost))
            segments += [
                (g, b.n_bytes - a.n_bytes, a.cost - b.cost) for a, b in itertools.pairwise(line)
            ]
        table = np.array(segments, np.float64).reshape(-1, 3)
        begun = np.array(starts, np.float64).reshape(-1, 2)
        return cls(begun[:, 0], begun[:, 1], table[:, 0].astype(np.intp), table[:, 1], table[:, 2])

    def and_other(
        self, other: "Envelope", own: NDArray[np.bool_], others: NDArray[np.bool_]
    ) -> "Line":
        """Return the cost over bytes of some groups of this one together with some of another."""
        sums = [float(e.n_bytes[mask].sum()) for e, mask in ((self, own), (other, others))] + [
            float(e.cost[mask].sum()) for e, mask in ((self, own), (other, others))
        ]
        longer = np.concatenate([e.longer[m[e.group]] for e, m in ((self, own), (other, others))])
        cheaper = np.concatenate([e.cheaper[m[e.group]] for e, m in ((self, own), (other, others))])
        order = np.argsort(-cheaper / longer, kind="stable")
        return Line(
            np.cumsum([sums[0] + sums[1], *longer[order]]),
            np.cumsum([sums[2] + sums[3], *-cheaper[order]]),
        )


@dataclass(frozen=True)
class Line:
    """The least cost at ascending bytes; linear between them, the last one beyond them."""

    n_bytes: Floats
    cost: Floats

    def at(self, capacity: Floats | float) -> Floats:
        """Return the cost at capacities; infinite where nothing fits."""
        found = np.interp(capacity, self.n_bytes, self.cost)
        return np.where(np.asarray(capacity) < self.n_bytes[0], np.inf, np.maximum(found, 0.0))


def least_of_both(a: Line, b: Line, of_a: float, of_b: float, together: float) -> float:
    """Return the least cost of both within the capacity of each, and of both together."""
    of_a, of_b = min(of_a, float(a.n_bytes[-1])), min(of_b, float(b.n_bytes[-1]))
    if of_a + of_b <= together:
        return float(a.at(of_a) + b.at(of_b))
    low, high = max(float(a.n_bytes[0]), together - of_b), of_a
    if low > high:
        return float("inf")
    # The sum is convex in what the first one gets; its least is at a bend of either, or an end.
    bends = np.concatenate([a.n_bytes, together - b.n_bytes, [low, high]])
    tried = np.clip(bends, low, high)
    return float((a.at(tried) + b.at(np.minimum(together - tried, of_b))).min())
