"""The knapsack with more limits than bytes: seconds of a generated token, and of a prompt's.

It is a multidimensional multiple-choice knapsack. Where the other limits do not bind, the knapsack
of bytes alone is the answer. Else its linear relaxation gives a price for each limit: the
Lagrangian at these prices bounds the cost from below. Few of its items are fractional; rounded and
improved it bounds the cost from above. Branch and bound narrows the two, with as many nodes as take
a few seconds; what is left between them is the gap. No clock and no random numbers: the same
problem has the same solution everywhere.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

from ramgguf.plan.knapsack import ROUNDING, Choice, Solution, smallest, solve

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
_NEAR = 1500  # choices that are exchanged in pairs: those next to the relaxation's prices
_MOST_EXCHANGES = 100
# Nodes of branch and bound: as many as solve relaxations of so many choices in all.
_COLUMNS, _FEWEST_NODES, _MOST_NODES = 60_000, 8, 150
_WHOLE = 1e-9
_INFEASIBLE = 2  # what linprog says where nothing fits
_ENOUGH = 1e-4  # a gap that ends the search
_TIGHTER = (0.0, 4e-6, 1e-4, 1e-3, 1e-2, 5e-2)  # shares of the limits, until rounding fits


class _UnsolvedError(Exception):
    """HiGHS gave a relaxation up."""


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
    rows, lower = table.searched()
    if rows is None:
        return None
    chosen = table.choice[rows].tolist()
    lower = max(lower, alone.cost * (1 - alone.gap))
    cost = float(sum(item[j].cost for item, j in zip(items, chosen, strict=True)))
    n_bytes = sum(item[j].n_bytes for item, j in zip(items, chosen, strict=True))
    gap = max(0.0, 1 - lower / cost) if cost > 0 else 0.0
    return Solution(tuple(chosen), n_bytes, cost, gap if gap > 1e3 * ROUNDING else 0.0)


@dataclass(frozen=True, eq=False)
class _Node:
    """A part of all selections: which choices are allowed, the relaxation's shares of them, the
    costs at its prices (infinite for what is not allowed), and the bound.
    """

    allowed: NDArray[np.bool_]
    shares: Floats
    value: Floats
    bound: float


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

    def searched(self) -> tuple[Indices | None, float]:
        """Return the cheapest selection found that fits, None if none was, and a lower bound."""
        try:
            root = self._node(np.ones(len(self.item), bool))
        except _UnsolvedError:
            root = None
        if root is None:
            return None, np.inf
        best, value = self._rounded(root)
        n_nodes = min(max(_FEWEST_NODES, _COLUMNS // len(self.item)), _MOST_NODES)
        number = 0
        open_, closed = [(root.bound, number, root)], np.inf
        while open_ and number < n_nodes:
            least = np.inf if best is None else float(self.cost[best].sum())
            if open_[0][0] >= least * (1 - _ENOUGH):
                break
            bound, _, node = heapq.heappop(open_)
            branches = self._branches(node)
            if not branches:  # nothing is fractional; what it was rounded to may cost a trifle more
                closed = min(closed, bound)
            for allowed in branches:
                number += 1
                try:
                    child = self._node(allowed)
                except _UnsolvedError:
                    closed = min(closed, bound)
                    continue
                if child is None:
                    continue
                rows, _ = self._rounded(child)
                if rows is not None and self.cost[rows].sum() < least:
                    best, least = rows, float(self.cost[rows].sum())
                heapq.heappush(open_, (max(bound, child.bound), number, child))
        if best is None:
            return None, np.inf
        best = self._exchanged(best, value)
        cost = float(self.cost[best].sum())
        return best, min(closed, cost, *(bound for bound, _, _ in open_[:1]))

    def _node(self, allowed: NDArray[np.bool_]) -> "_Node | None":
        """Return the relaxation of what is allowed; None where nothing fits it."""
        shares, prices = self._relaxed(allowed, 1.0)
        if shares is None:
            return None
        value = np.where(allowed, self.cost + prices @ self.used, np.inf)
        bound = float(np.minimum.reduceat(value, self.starts).sum() - prices.sum())
        return _Node(allowed, shares, value, bound)

    def _rounded(self, node: "_Node") -> tuple[Indices | None, Floats]:
        """Return a selection that fits, made from a relaxation, and the costs at its prices."""
        shares: Floats | None = node.shares
        for tighter in _TIGHTER:
            if tighter:
                try:
                    shares, _ = self._relaxed(node.allowed, 1 - tighter)
                except _UnsolvedError:
                    break
            if shares is None:
                break
            rows = self._repaired(self._nearest(shares), node.value)
            if rows is not None:
                return self._improved(rows), node.value
        return None, node.value

    def _branches(self, node: "_Node") -> list[NDArray[np.bool_]]:
        """Return what is allowed in the node's branches: a fractional choice, or not that."""
        most = np.maximum.reduceat(node.shares, self.starts)
        fractional = most < 1 - _WHOLE
        if not fractional.any():
            return []
        spread = np.maximum.reduceat(node.shares * self.cost, self.starts)
        item = int(np.argmax(np.where(fractional, spread, -1)))
        own = self._position == item
        column = int(np.argmax(np.where(own, node.shares, -1)))
        taken, left = node.allowed & ~own, node.allowed.copy()
        taken[column], left[column] = True, False
        return [taken, left]

    def _constraints(self) -> csr_array:
        n = len(self.item)
        return csr_array((np.ones(n), (self._position, np.arange(n))))

    def _relaxed(self, allowed: NDArray[np.bool_], share: float) -> tuple[Floats | None, Floats]:
        """Return the shares of choices in the relaxation at a share of the limits, and prices."""
        one_each = self._constraints()
        scale = float(np.abs(self.cost).max()) or 1.0
        found = linprog(
            self.cost / scale,
            A_ub=self.used,
            b_ub=np.full(len(self.used), share),
            A_eq=one_each,
            b_eq=np.ones(one_each.shape[0]),
            bounds=np.column_stack([np.zeros(len(allowed)), allowed]),
            method="highs",
        )
        if found.status == _INFEASIBLE:
            return None, np.zeros(len(self.used))
        if found.x is None:
            raise _UnsolvedError(found.message)
        return found.x, np.maximum(0.0, -scale * found.ineqlin.marginals)

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
            rate = np.where((gain > 0) & np.isfinite(value), gain / rise, -np.inf)
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

    def _exchanged(self, rows: Indices, value: Floats) -> Indices:
        """Return the selection after the switches of two items that lower the cost most and fit.

        value is the cost at the relaxation's prices.
        """
        rows, position = rows.copy(), self._position
        above = value - np.minimum.reduceat(value, self.starts)[position]
        near = np.sort(np.argsort(above, kind="stable")[:_NEAR])
        own = position[near]
        apart = own[:, None] != own
        for _ in range(_MOST_EXCHANGES):
            room = 1 - self.used[:, rows].sum(axis=1)
            gain = self.cost[rows][own] - self.cost[near]
            extra = self.used[:, near] - self.used[:, rows][:, own]
            both = gain[:, None] + gain
            possible = apart & (both > 0)
            for more, left in zip(extra, room, strict=True):
                possible &= more[:, None] + more <= left
            if not possible.any():
                break
            a, b = np.unravel_index(int(np.argmax(np.where(possible, both, 0))), both.shape)
            rows[own[a]], rows[own[b]] = near[a], near[b]
        return self._improved(rows)


def _undominated(rows: Floats) -> list[int]:
    """Return the rows that no other row is at most in every column; of equal ones, the first."""
    kept: list[int] = []
    for j in np.lexsort(rows.T[::-1]).tolist():
        if not (rows[kept] <= rows[j]).all(axis=1).any():
            kept.append(j)
    return sorted(kept)
