"""The multiple-choice knapsack: one choice per item, least total cost, within a number of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import BudgetError

MAX_STATES = 50_000
ROUNDING = 1e-12  # relative: costs are sums of some thousand doubles


@dataclass(frozen=True)
class Choice:
    """One way to take an item."""

    n_bytes: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """The index chosen for each item; gap is (cost − proven lower bound) / cost."""

    chosen: tuple[int, ...]
    n_bytes: int
    cost: float
    gap: float


def smallest(items: Sequence[Sequence[Choice]]) -> int:
    """Return the fewest bytes that any selection takes."""
    return sum(min(c.n_bytes for c in item) for item in items)


def solve(
    items: Sequence[Sequence[Choice]], capacity: int, *, max_states: int = MAX_STATES
) -> Solution:
    """Return the cheapest selection of at most `capacity` bytes, with its proven gap.

    The Lagrangian relaxation bounds the cost from below and a greedy repair from above; between
    the two, partial selections are enumerated item by item, those nearest to the break of the
    relaxation first, and dropped when another is as small and as cheap or when their bound is no
    better than what was found (Pisinger, A minimal algorithm for the multiple-choice knapsack
    problem, European Journal of Operational Research 83, 1995). Of more than max_states the least
    promising are dropped, and the best bound among them limits what is proven. Takes no clock and
    no random numbers: the same problem has the same solution everywhere.
    Raises BudgetError when even the smallest selection is too large.
    """
    if smallest(items) > capacity:
        raise BudgetError(f"{capacity} bytes are below the smallest selection, {smallest(items)}")
    table = _Table.of(items)
    price = _price(table, capacity)
    lower = _dual(table, price, capacity)
    best = _greedy(table, price, capacity)
    upper = float(table.cost[best].sum())
    if upper > lower:
        found, proven = _Search(table, price, capacity, upper - lower, max_states).run()
        lower += proven
        if found is not None and table.cost[found].sum() < upper:
            best = found
    cost = float(table.cost[best].sum())
    gap = max(0.0, 1 - lower / cost) if cost > 0 else 0.0
    n_bytes = int(table.n_bytes[best].sum())
    return Solution(tuple(table.choice[best].tolist()), n_bytes, cost, gap if gap > ROUNDING else 0)


def price(items: Sequence[Sequence[Choice]], capacity: int) -> float:
    """Return the Lagrange multiplier of the capacity: what a byte more would lower the cost by.

    It is the least price per byte at which every item's cheapest choice, bytes paid for, fits.
    """
    return _price(_Table.of(items), capacity)


@dataclass(frozen=True)
class _Table:
    """Choices of all items in one column each, grouped by item and by ascending bytes."""

    item: NDArray[np.intp]
    choice: NDArray[np.intp]
    n_bytes: NDArray[np.int64]
    cost: NDArray[np.float64]

    @classmethod
    def of(cls, items: Sequence[Sequence[Choice]]) -> "_Table":
        rows = [
            (i, j, item[j].n_bytes, item[j].cost)
            for i, item in enumerate(items)
            for j in efficient(item)
        ]
        item, choice, n_bytes, cost = zip(*rows, strict=True)
        return cls(
            np.array(item, np.intp),
            np.array(choice, np.intp),
            np.array(n_bytes, np.int64),
            np.array(cost, np.float64),
        )

    @property
    def starts(self) -> NDArray[np.intp]:
        return np.flatnonzero(np.diff(self.item, prepend=-1))

    def cheapest_at(self, price: float) -> NDArray[np.intp]:
        """Return each item's row of least cost + price · bytes, the smaller one of equals."""
        value = self.cost + price * self.n_bytes
        least = np.minimum.reduceat(value, self.starts)
        is_least = value <= least[self.item]
        return np.flatnonzero(is_least)[np.unique(self.item[is_least], return_index=True)[1]]


def efficient(item: Sequence[Choice]) -> list[int]:
    """Return the choices that no other choice beats in both bytes and cost, smallest first."""
    kept: list[int] = []
    for j in sorted(range(len(item)), key=lambda j: (item[j].n_bytes, item[j].cost)):
        if not kept or item[j].cost < item[kept[-1]].cost:
            kept.append(j)
    return kept


def hull(choices: Sequence[Choice]) -> list[int]:
    """Return the indices of the lower convex hull of (bytes, cost), by ascending bytes."""
    kept: list[int] = []
    for j in sorted(range(len(choices)), key=lambda j: (choices[j].n_bytes, choices[j].cost)):
        new = choices[j]
        if kept and new.cost >= choices[kept[-1]].cost:
            continue
        while len(kept) > 1:
            a, b = choices[kept[-2]], choices[kept[-1]]
            bends = (a.cost - b.cost) * (new.n_bytes - b.n_bytes) > (b.cost - new.cost) * (
                b.n_bytes - a.n_bytes
            )
            if bends:
                break
            kept.pop()
        kept.append(j)
    return kept


def _price(table: _Table, capacity: int) -> float:
    """Return the least price per byte at which every item's best choice fits the capacity."""
    if table.n_bytes[table.cheapest_at(0.0)].sum() <= capacity:
        return 0.0
    low, high = 0.0, 1.0
    spread = float(np.ptp(table.cost)) or 1.0
    while table.n_bytes[table.cheapest_at(high * spread)].sum() > capacity:
        low, high = high, high * 4
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        fits = table.n_bytes[table.cheapest_at(middle * spread)].sum() <= capacity
        low, high = (low, middle) if fits else (middle, high)
    return high * spread


def _dual(table: _Table, price: float, capacity: int) -> float:
    rows = table.cheapest_at(price)
    return float((table.cost[rows] + price * table.n_bytes[rows]).sum() - price * capacity)


def _greedy(table: _Table, price: float, capacity: int) -> NDArray[np.intp]:
    """Return a selection that fits: the best at the price, then the steps up that pay most."""
    rows = table.cheapest_at(price)
    room = capacity - int(table.n_bytes[rows].sum())
    while True:
        gain = table.cost[rows][table.item] - table.cost
        extra = table.n_bytes - table.n_bytes[rows][table.item]
        fits = (gain > 0) & (extra <= room)
        if not fits.any():
            return rows
        rate = np.where(fits, gain / np.maximum(extra, 1), -np.inf)
        row = int(np.argmax(rate))
        room -= int(extra[row])
        rows[table.item[row]] = row


@dataclass(frozen=True)
class _States:
    """Partial selections: room left (may be negative so far) and cost above the relaxation's bound.

    parent and row tell how each was made from those of the stage before.
    """

    room: NDArray[np.int64]
    cost: NDArray[np.float64]
    parent: NDArray[np.int32]
    row: NDArray[np.int32]

    def taken(self, index: NDArray[np.intp]) -> "_States":
        return _States(self.room[index], self.cost[index], self.parent[index], self.row[index])


class _Search:
    """The enumeration of what may beat the greedy selection.

    It starts from the relaxation's selection at the price. A state's cost is the cheapest that it
    may be completed to if the rest of the items change nothing; what they change costs at least
    `up` (or saves at most `down`) per byte, the best rates among the items still to come.
    """

    def __init__(
        self, table: _Table, price: float, capacity: int, gap: float, max_states: int
    ) -> None:
        self._table, self._price, self._gap, self._max_states = table, price, gap, max_states
        self._base = table.cheapest_at(price)
        base = self._base[table.item]
        self._extra = table.n_bytes - table.n_bytes[base]
        self._rise = table.cost - table.cost[base]
        self._room = capacity - int(table.n_bytes[self._base].sum())
        self._incumbent: tuple[int, int] | None = None  # stage and state
        self._starts = table.starts
        self._ends = np.append(self._starts[1:], len(table.item))
        self._trail: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        # A state that was dropped for lack of space is at best as good as this.
        self._dropped = gap

    def run(self) -> tuple[NDArray[np.intp] | None, float]:
        """Return the best selection found, if any beats the gap, and the proven share of the gap.

        The share is in units of cost: no selection costs less than the relaxation plus it.
        """
        one = np.zeros(1, np.int32)
        start = np.array([self._room], np.int64), np.array([self._price * self._room])
        states = _States(*start, one, one - 1)
        order, up, down = self._order()
        self._look(states)
        worthwhile, told_at = self._worthwhile(), self._gap
        for k, item in enumerate(order):
            if self._gap < told_at:
                worthwhile, told_at = self._worthwhile(), self._gap
            if not worthwhile[item]:
                continue
            rows = self._alternatives(item)
            states = self._pruned(self._branched(states, rows), up[k], down[k])
            if not len(states.room):
                break
            self._look(states)
        return self._selection(), min(self._gap, self._dropped)

    def _order(self) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
        """Return the items by how near a choice of theirs is to the price, and the rates to come.

        up[k] and down[k] are the least that a byte more, or less, costs above the price in the
        items after the k-th.
        """
        reduced = self._rise + self._price * self._extra
        distance = np.full(len(reduced), np.inf)
        other = self._extra != 0
        distance[other] = np.maximum(reduced[other], 0) / np.abs(self._extra[other])
        ups = np.minimum.reduceat(np.where(self._extra > 0, distance, np.inf), self._starts)
        downs = np.minimum.reduceat(np.where(self._extra < 0, distance, np.inf), self._starts)
        order = np.argsort(np.minimum(ups, downs), kind="stable")

        def to_come(rates: NDArray[np.float64]) -> NDArray[np.float64]:
            later = np.append(rates[order][1:], np.inf)
            return np.minimum.accumulate(later[::-1])[::-1]

        return order.tolist(), to_come(ups), to_come(downs)

    def _worthwhile(self) -> NDArray[np.bool_]:
        """Return which items have another row than the base that could be part of something better.

        That is most items of a small problem, and few of a large one, whose gap is small.
        """
        better = self._rise + self._price * self._extra < self._gap
        better[self._base] = False
        found: NDArray[np.bool_] = np.logical_or.reduceat(better, self._starts)
        return found

    def _alternatives(self, item: int) -> NDArray[np.intp]:
        """Return the item's rows, the base first, that could still be part of something better."""
        rows = np.arange(self._starts[item], self._ends[item])
        rows = rows[self._rise[rows] + self._price * self._extra[rows] < self._gap]
        return np.append(self._base[item], rows[rows != self._base[item]])

    def _branched(self, states: _States, rows: NDArray[np.intp]) -> _States:
        n = len(states.room)
        return _States(
            (states.room - self._extra[rows][:, None]).ravel(),
            (states.cost + self._rise[rows][:, None]).ravel(),
            np.tile(np.arange(n, dtype=np.int32), len(rows)),
            np.repeat(rows.astype(np.int32), n),
        )

    def _pruned(self, states: _States, up: float, down: float) -> _States:
        """Return the states that nothing dominates and whose bound beats the gap."""
        rate = np.where(states.room >= 0, min(self._price, up) - self._price, -self._price - down)
        bound = states.cost + states.room * rate
        kept = np.flatnonzero(bound < self._gap * (1 - ROUNDING))
        by_room = kept[np.lexsort((states.cost[kept], -states.room[kept]))]
        cost = states.cost[by_room]
        cheaper = cost < np.minimum.accumulate(np.append(np.inf, cost[:-1]))
        kept = by_room[cheaper]
        if len(kept) > self._max_states:
            by_bound = np.argsort(bound[kept], kind="stable")
            self._dropped = min(self._dropped, float(bound[kept[by_bound[self._max_states]]]))
            kept = kept[np.sort(by_bound[: self._max_states])]
        return states.taken(kept)

    def _look(self, states: _States) -> None:
        """Keep the stage, and its best state that fits if it is the best so far."""
        self._trail.append((states.parent, states.row))
        cost = np.where(states.room >= 0, states.cost, np.inf)
        best = int(np.argmin(cost))
        if cost[best] < self._gap:
            self._gap, self._incumbent = float(cost[best]), (len(self._trail) - 1, best)

    def _selection(self) -> NDArray[np.intp] | None:
        if self._incumbent is None:
            return None
        stage, state = self._incumbent
        rows = self._base.copy()
        for parents, changed in self._trail[stage:0:-1]:
            row = int(changed[state])
            rows[self._table.item[row]] = row
            state = int(parents[state])
        return rows
