"""Which changes of a plan are worth a trial: the expected gain of each, and its uncertainty.

The predicted cost of a change is multiplied by a factor of its tensor, which is not known exactly.
The factors are normally distributed; every trial observes a weighted sum of some of them (a Kalman
filter without dynamics). What promises most is what has the largest expected improvement
(Jones, Schonlau and Welch, Efficient global optimization, J. Global Optimization 13, 1998).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.plan import Choice, efficient

Floats = NDArray[np.float64]
N_NEIGHBOURS = 2
N_STEPS = 600  # the most promising changes of one item, of which pairs are made
N_PAIRS = 200  # the most promising pairs: as they are, and with a third change


@dataclass(frozen=True)
class Move:
    """Items that change to another choice: (item, choice) pairs, bytes added, cost added."""

    changes: tuple[tuple[int, int], ...]
    n_bytes: int
    cost: tuple[float, ...]


@dataclass(frozen=True)
class _Steps:
    """Changes of a single item to a choice near its present one, one per row."""

    item: NDArray[np.intp]
    choice: NDArray[np.intp]
    n_bytes: NDArray[np.int64]
    cost: Floats

    @classmethod
    def of(cls, items: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> "_Steps":
        rows = [
            (i, j, item[j].n_bytes - item[now].n_bytes, item[j].cost - item[now].cost)
            for i, (item, now) in enumerate(zip(items, chosen, strict=True))
            for j in _neighbours(item, now)
        ]
        columns = zip(*rows, strict=True) if rows else ((), (), (), ())
        item, choice, n_bytes, cost = (list(c) for c in columns)
        return cls(
            np.array(item, np.intp),
            np.array(choice, np.intp),
            np.array(n_bytes, np.int64),
            np.array(cost, np.float64),
        )

    def taken(self, rows: NDArray[np.intp]) -> "_Steps":
        return _Steps(self.item[rows], self.choice[rows], self.n_bytes[rows], self.cost[rows])

    def move(self, rows: Sequence[int]) -> Move:
        """Return the steps of these rows as one, by ascending item."""
        by_item = sorted(rows, key=lambda r: int(self.item[r]))
        return Move(
            tuple((int(self.item[r]), int(self.choice[r])) for r in by_item),
            int(self.n_bytes[by_item].sum()),
            tuple(float(self.cost[r]) for r in by_item),
        )


def _neighbours(item: Sequence[Choice], now: int) -> list[int]:
    """Return the N_NEIGHBOURS next smaller and next larger of the item's efficient choices.

    A factor is learned from small changes. It says nothing about a jump from eight bits to two.
    """
    kept = efficient(item)
    smaller = [j for j in kept if item[j].n_bytes < item[now].n_bytes]
    larger = [j for j in kept if item[j].n_bytes > item[now].n_bytes]
    return smaller[-N_NEIGHBOURS:] + larger[:N_NEIGHBOURS]


class Posterior:
    """The factors' mean and covariance; errors are the relative standard errors of the items."""

    def __init__(self, scale: float, errors: Sequence[float]) -> None:
        relative = np.array(errors, np.float64)
        self.mean = np.full(len(relative), scale)
        self.covariance = np.diag((scale * relative) ** 2)

    def observe(self, move: Move, change: float, error: float) -> None:
        """Take note that the move changed the true cost by so much, give or take the error."""
        h = np.zeros(len(self.mean))
        for (item, _), cost in zip(move.changes, move.cost, strict=True):
            h[item] += cost
        spread = self.covariance @ h
        variance = float(h @ spread) + error**2
        if variance <= 0:
            return
        self.mean = self.mean + spread * ((change - float(h @ self.mean)) / variance)
        self.covariance = self.covariance - np.outer(spread, spread) / variance

    def expected(self, move: Move) -> tuple[float, float]:
        """Return the move's expected change of the true cost, and its standard deviation."""
        items = [i for i, _ in move.changes]
        cost = np.array(move.cost)
        variance = float(cost @ self.covariance[np.ix_(items, items)] @ cost)
        return float(cost @ self.mean[items]), max(0.0, variance) ** 0.5

    def proposals(
        self, items: Sequence[Sequence[Choice]], chosen: Sequence[int], room: int, price: float
    ) -> Iterator[Move]:
        """Yield moves of two or three items that fit the room, the most promising first.

        price is what a byte is worth in units of the items' cost: it ranks what does not fit by
        itself, and is completed by a further change.
        """
        steps = _Steps.of(items, chosen)
        paid = price * self.mean[steps.item] * steps.n_bytes
        mean = steps.cost * self.mean[steps.item]
        variance = steps.cost**2 * np.diag(self.covariance)[steps.item]
        best = np.argsort(-improvement(mean + paid, variance), kind="stable")[:N_STEPS]
        if len(best) < 2:
            return
        steps, mean, variance, paid = steps.taken(best), mean[best], variance[best], paid[best]
        covariance = np.outer(steps.cost, steps.cost)
        covariance *= self.covariance[np.ix_(steps.item, steps.item)]
        pairs = _Pairs(steps, mean, variance, covariance, paid)
        found = sorted([*pairs.fitting(room), *pairs.completed(room)], key=lambda f: (-f[0], f[1]))
        seen: set[tuple[tuple[int, int], ...]] = set()
        for _, rows in found:
            move = steps.move(rows)
            if move.changes not in seen:
                seen.add(move.changes)
                yield move


class _Pairs:
    """All pairs of steps of different items: their expected change, variance and bytes."""

    def __init__(
        self, steps: _Steps, mean: Floats, variance: Floats, covariance: Floats, paid: Floats
    ) -> None:
        self._steps, self._single, self._covariance = steps, (mean, variance), covariance
        self._mean = mean[:, None] + mean
        self._variance = variance[:, None] + variance + 2 * covariance
        self._n_bytes = steps.n_bytes[:, None] + steps.n_bytes
        self._paid = paid[:, None] + paid
        self._differ = np.triu(steps.item[:, None] != steps.item)

    def fitting(self, room: int) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Yield the N_PAIRS most promising pairs that fit, each with its expected improvement."""
        value = improvement(self._mean, self._variance)
        for i, j in self._best(np.where(self._n_bytes <= room, value, 0.0)):
            yield float(value[i, j]), (i, j)

    def completed(self, room: int) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Yield the most promising pairs, bytes paid for, each with its best third step."""
        mean, variance = self._single
        item, n_bytes = self._steps.item, self._steps.n_bytes
        for i, j in self._best(improvement(self._mean + self._paid, self._variance)):
            spread = variance + self._variance[i, j]
            spread = spread + 2 * (self._covariance[i] + self._covariance[j])
            value = improvement(mean + self._mean[i, j], spread)
            free = (item != item[i]) & (item != item[j])
            value = np.where(free & (n_bytes + self._n_bytes[i, j] <= room), value, 0.0)
            k = int(np.argmax(value))
            if value[k] > 0:
                yield float(value[k]), (i, j, k)

    def _best(self, value: Floats) -> Iterator[tuple[int, int]]:
        value = np.where(self._differ, value, 0.0)
        n = min(N_PAIRS, value.size)
        top = np.argpartition(-value, n - 1, axis=None)[:n]
        for index in top[np.lexsort((top, -value.ravel()[top]))]:
            i, j = divmod(int(index), len(value))
            if value[i, j] > 0:
                yield i, j


def improvement(mean: Floats, variance: Floats) -> Floats:
    """Return the expected fall of a cost that changes by mean, give or take √variance."""
    from scipy.special import ndtr  # takes 0.2 s, which other commands need not wait

    deviation = np.sqrt(np.maximum(variance, 1e-300))
    z = -mean / deviation
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return np.asarray(-mean * ndtr(z) + deviation * density)
