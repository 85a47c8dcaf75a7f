"""The multiple-choice knapsack: one choice per item, least total cost, within a number of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.errors import BudgetError


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
    items: Sequence[Sequence[Choice]],
    capacity: int,
    *,
    rel_gap: float = 1e-6,
    seconds: float = 5.0,
) -> Solution:
    """Return the cheapest selection of at most `capacity` bytes, with its proven gap.

    The Lagrangian relaxation bounds the cost from below and a greedy repair from above; choices
    whose reduced cost exceeds the difference are in no better selection and are dropped; HiGHS
    solves the rest (Sinha and Zoltners, The multiple-choice knapsack problem, 1979).
    Raises BudgetError when even the smallest selection is too large.
    """
    if smallest(items) > capacity:
        raise BudgetError(f"{capacity} bytes are below the smallest selection, {smallest(items)}")
    table = _Table.of(items)
    price = _price(table, capacity)
    lower = _dual(table, price, capacity)
    best = _greedy(table, price, capacity)
    upper = float(table.cost[best].sum())
    if upper - lower > rel_gap * upper:
        core = _core(table, best, price, lower, upper)
        found, lower = _branch_and_bound(core, capacity, lower, upper, seconds)
        if found is not None and core.cost[found].sum() < upper:
            best, table = found, core
    cost = float(table.cost[best].sum())
    gap = max(0.0, 1 - lower / cost) if cost > 0 else 0.0
    n_bytes = int(table.n_bytes[best].sum())
    return Solution(tuple(table.choice[best].tolist()), n_bytes, cost, gap if gap > 1e-12 else 0.0)


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
            for j in _efficient(item)
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


def _efficient(item: Sequence[Choice]) -> list[int]:
    """Return the choices that no other choice beats in both bytes and cost, smallest first."""
    kept: list[int] = []
    for j in sorted(range(len(item)), key=lambda j: (item[j].n_bytes, item[j].cost)):
        if not kept or item[j].cost < item[kept[-1]].cost:
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


def _core(
    table: _Table, best: NDArray[np.intp], price: float, lower: float, upper: float
) -> _Table:
    value = table.cost + price * table.n_bytes
    reduced = value - np.minimum.reduceat(value, table.starts)[table.item]
    keep = reduced <= (upper - lower) * (1 + 1e-9)
    keep[best] = True
    return _Table(table.item[keep], table.choice[keep], table.n_bytes[keep], table.cost[keep])


def _branch_and_bound(
    core: _Table, capacity: int, lower: float, upper: float, seconds: float
) -> tuple[NDArray[np.intp] | None, float]:
    """Return HiGHS's selection, if it found one that fits, and the proven lower bound.

    A bound proven for a limit tightened below the capacity would not hold: only the first counts.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    # Differences to each item's first choice, in units of the gap to close: well-scaled numbers.
    extra = core.n_bytes - core.n_bytes[core.starts][core.item]
    saving = (core.cost - core.cost[core.starts][core.item]) / (upper - lower)
    base = float(core.cost[core.starts].sum())
    room = capacity - int(core.n_bytes[core.starts].sum())
    unit = float(np.gcd.reduce(np.append(extra, 0))) or 1.0
    n = len(extra)
    n = len(extra)
    one_each = csr_array((np.ones(n), (core.item, np.arange(n))))
    limit = float(room // unit)
    last = np.append(core.starts[1:], n)
    for attempt in range(3):
        found = milp(
            saving,
            constraints=LinearConstraint(
                vstack([one_each, csr_array(extra[None, :] / unit)]),
                np.append(np.ones(len(core.starts)), -np.inf),
                np.append(np.ones(len(core.starts)), limit),
            ),
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": seconds},
        )
        proven = found.mip_dual_bound
        if attempt == 0 and proven is not None and np.isfinite(proven):
            lower = max(lower, base + proven * (upper - lower))
        if found.x is None:
            break
        rows = np.array(
            [a + int(np.argmax(found.x[a:b])) for a, b in zip(core.starts, last, strict=True)]
        )
        excess = int(core.n_bytes[rows].sum()) - capacity
        if excess <= 0:
            return rows, lower
        limit -= np.ceil(excess / unit)  # the solver's tolerance let it over by a little
    return None, lower
