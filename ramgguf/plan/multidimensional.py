"""The knapsack with more limits than bytes: seconds of a generated token, and of a prompt's.

It is a multidimensional multiple-choice knapsack. Where the other limits do not bind, the knapsack
of bytes alone is the answer. Else its linear relaxation (HiGHS) gives a price for each limit: the
Lagrangian at these prices bounds the cost from below. The relaxation divides few items; rounded
and improved step by step, it bounds the cost from above. What the two bounds leave open is searched
by branch and bound (HiGHS), if that is little, and the rest is the gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from ramgguf.plan.knapsack import ROUNDING, Choice, Solution, smallest, solve

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
# What ends a search, so that the same problem has the same solution everywhere: no clock.
_MAX_NODES = 500
_MOST_NEAR = 600  # choices, beside one of each item, that are searched first
_MOST_OPEN = 600  # that are searched to the end
_TOLERANCE = 2e-6  # somewhat more than HiGHS's
_TIGHTER = (0.0, 4e-6, 1e-4, 1e-3, 1e-2, 5e-2)  # shares of the limits, until rounding fits


@dataclass(frozen=True)
class Resource:
    """A limit besides bytes: what every choice of every item uses, and how much there is."""

    used: Sequence[Sequence[float]]
    limit: float

    def of(self, chosen: Sequence[int]) -> float:
        """Return what a selection uses."""
        return sum(item[j] for item, j in zip(self.used, chosen, strict=True))

    def fits(self, chosen: Sequence[int]) -> bool:
        """Return whether a selection keeps to the limit."""
        return self.of(chosen) <= self.limit * (1 + ROUNDING)


def solve_within(
    items: Sequence[Sequence[Choice]], capacity: int, resources: Sequence[Resource]
) -> Solution | None:
    """Return a cheap selection within all limits, with its proven gap; None if none was found.

    None is proven where a limit alone, or all together in the relaxation, cannot be kept.
    """
    if smallest(items) > capacity:
        return None
    alone = solve(items, capacity)
    if all(r.fits(alone.chosen) for r in resources):
        return alone
    table = _Table.of(items, capacity, resources)
    rows, lower = table.rounded()
    if rows is None:
        return None
    rows, proven = table.searched(rows, lower)
    chosen = table.choice[rows].tolist()
    lower = max(proven, alone.cost * (1 - alone.gap))
    cost = float(sum(item[j].cost for item, j in zip(items, chosen, strict=True)))
    n_bytes = sum(item[j].n_bytes for item, j in zip(items, chosen, strict=True))
    gap = max(0.0, 1 - lower / cost) if cost > 0 else 0.0
    return Solution(tuple(chosen), n_bytes, cost, gap if gap > 1e3 * ROUNDING else 0.0)


@dataclass(frozen=True)
class _Table:
    """Choices of all items, one in each column; used is a share of each limit, bytes first."""

    item: Indices
    choice: Indices
    cost: Floats
    used: Floats  # (limits, choices)
    starts: Indices

    @classmethod
    def of(
        cls, items: Sequence[Sequence[Choice]], capacity: int, resources: Sequence[Resource]
    ) -> "_Table":
        columns = []
        for i, choices in enumerate(items):
            rows = [(c.cost, c.n_bytes, *(r.used[i][k] for r in resources))
                    for k, c in enumerate(choices)]  # fmt: skip
            own = np.array(rows, np.float64)
            columns += [(i, j, *own[j]) for j in _undominated(own)]
        table = np.array(columns, np.float64)
        limits = np.array([capacity, *(r.limit for r in resources)], np.float64)
        item: Indices = table[:, 0].astype(np.intp)
        return cls(
            item,
            table[:, 1].astype(np.intp),
            table[:, 2],
            (table[:, 3:] / limits).T,
            np.flatnonzero(np.diff(item, prepend=-1)),
        )

    @cached_property
    def _position(self) -> Indices:
        """Each column's item, counted from 0 without gaps."""
        return np.repeat(np.arange(len(self.starts)), np.diff([*self.starts, len(self.item)]))

    def rounded(self) -> tuple[Indices | None, float]:
        """Return a selection that fits, made from the relaxation, and the relaxation's bound.

        None where nothing fits the relaxation, or what it rounds to.
        """
        lower = -np.inf
        for tighter in _TIGHTER:
            shares, prices = self._relaxed(1 - tighter)
            if shares is None:
                break
            lower = max(lower, self._bound(prices))
            rows = self._repaired(self._nearest(shares), self.cost + prices @ self.used)
            if rows is not None:
                return self._improved(rows), lower
        return None, lower

    def searched(self, rows: Indices, lower: float) -> tuple[Indices, float]:
        """Return a selection that is at least as cheap, and a bound at least as high.

        The choices next to the relaxation's prices are searched first. Those that the prices put
        above the selection then found are in no cheaper one; if few others are left, these are
        searched to the end.
        """
        shares, prices = self._relaxed(1.0)
        if shares is None:
            return rows, lower
        reduced = self.cost + prices @ self.used
        reduced = reduced - np.minimum.reduceat(reduced, self.starts)[self._position]
        near = np.sort(reduced)[min(len(reduced), len(self.starts) + _MOST_NEAR) - 1]
        rows, _ = self._among(reduced <= near, rows, 1 - _TOLERANCE)
        cost = float(self.cost[rows].sum())
        is_open = reduced < cost - lower
        if np.count_nonzero(is_open) - len(self.starts) > _MOST_OPEN:
            return rows, lower
        # What is left out costs at least as much as the selection that is there.
        rows, bound = self._among(is_open, rows, 1.0)
        return rows, max(lower, min(bound, cost))

    def _among(
        self, is_kept: NDArray[np.bool_], rows: Indices, share: float
    ) -> tuple[Indices, float]:
        """Return the best of the selection and those of the choices kept, and their bound.

        Those keep to a share of the limits.
        """
        is_kept[rows] = True
        kept = np.flatnonzero(is_kept)
        cost = float(self.cost[rows].sum())
        if len(kept) == len(self.starts):
            return rows, cost
        core = _Table(
            self.item[kept], kept, self.cost[kept], self.used[:, kept],
            np.flatnonzero(np.diff(self.item[kept], prepend=-1)),
        )  # fmt: skip
        found, bound = core._branched(share)
        if found is not None and self.cost[kept[found]].sum() < cost and self._fits(kept[found]):
            rows = kept[found]
        return rows, bound

    def _constraints(self) -> csr_array:
        n = len(self.item)
        return csr_array((np.ones(n), (self._position, np.arange(n))))

    def _relaxed(self, share: float) -> tuple[Floats | None, Floats]:
        """Return the shares of choices in the relaxation at a share of the limits, and prices."""
        one_each = self._constraints()
        scale = float(np.abs(self.cost).max()) or 1.0
        found = linprog(
            self.cost / scale,
            A_ub=self.used,
            b_ub=np.full(len(self.used), share),
            A_eq=one_each,
            b_eq=np.ones(one_each.shape[0]),
            bounds=(0, None),
            method="highs",
        )
        if found.x is None:
            return None, np.zeros(len(self.used))
        return found.x, np.maximum(0.0, -scale * found.ineqlin.marginals)

    def _bound(self, prices: Floats) -> float:
        """Return the Lagrangian's bound at these prices, whatever they are."""
        value = self.cost + prices @ self.used
        return float(np.minimum.reduceat(value, self.starts).sum() - prices.sum())

    def _nearest(self, shares: Floats) -> Indices:
        """Return each item's choice of the largest share."""
        most = np.maximum.reduceat(shares, self.starts)
        is_most = np.flatnonzero(shares >= most[self._position])
        found: Indices = is_most[np.unique(self._position[is_most], return_index=True)[1]]
        return found

    def _fits(self, rows: Indices) -> bool:
        return bool((self.used[:, rows].sum(axis=1) <= 1 + ROUNDING).all())

    def _repaired(self, rows: Indices, value: Floats) -> Indices | None:
        """Return the selection after switches that end its excess, cheapest first; None if none do.

        value is the cost at the relaxation's prices.
        """
        rows = rows.copy()
        for _ in range(len(self.starts)):
            over = self.used[:, rows].sum(axis=1) - 1
            if (over <= ROUNDING).all():
                return rows
            change = self.used - self.used[:, rows][:, self._position]
            less = np.minimum(-change, np.maximum(over, 0)[:, None])
            less = np.where(over[:, None] > 0, less, -np.maximum(0, change + over[:, None]))
            gain = less.sum(axis=0)
            rise = np.maximum(0, value - value[rows][self._position]) + 1e-300
            rate = np.where(gain > 0, gain / rise, -np.inf)
            row = int(np.argmax(rate))
            if rate[row] == -np.inf:
                return None
            rows[self._position[row]] = row
        return rows if self._fits(rows) else None

    def _improved(self, rows: Indices) -> Indices:
        """Return the selection after the switches of one item that lower the cost most and fit."""
        rows, position = rows.copy(), self._position
        while True:
            room = 1 - self.used[:, rows].sum(axis=1)
            gain = self.cost[rows][position] - self.cost
            extra = self.used - self.used[:, rows][:, position]
            fits = (gain > 0) & (extra <= room[:, None]).all(axis=0)
            if not fits.any():
                return rows
            row = int(np.argmax(np.where(fits, gain, -np.inf)))
            rows[position[row]] = row

    def _branched(self, share: float) -> tuple[Indices | None, float]:
        """Return the best selection that branch and bound finds, and the bound that it proves."""
        least = np.minimum.reduceat(self.cost, self.starts)
        rise = self.cost - least[self._position]
        scale = float(rise.max()) or 1.0
        result = milp(
            rise / scale,
            integrality=np.ones(len(rise)),
            bounds=(0, 1),
            constraints=[
                LinearConstraint(self._constraints(), 1, 1),
                LinearConstraint(self.used, -np.inf, share),
            ],
            options={"node_limit": _MAX_NODES, "mip_rel_gap": 1e-7},
        )
        bound = -np.inf
        if result.mip_dual_bound is not None:
            bound = float(least.sum()) + scale * float(result.mip_dual_bound)
        return (None if result.x is None else self._nearest(result.x)), bound


def _undominated(rows: Floats) -> list[int]:
    """Return the rows that no other row is at most in every column; of equal ones, the first."""
    kept: list[int] = []
    for j in np.lexsort(rows.T[::-1]).tolist():
        if not (rows[kept] <= rows[j]).all(axis=1).any():
            kept.append(j)
    return sorted(kept)
