"""A plan for two memories as it changes: what a change of formats may take of each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ramgguf.plan.pools import UNLIMITED, DivisionRoom, PooledProblem, Pools
from ramgguf.plan.problem import Problem
from ramgguf.plan.result import MemoryBudget, MemoryUse, Plan

Changes = Sequence[tuple[int, int]]  # groups, and their new choices


class DividedPlan:
    """What the division of a plan leaves for changes; chosen are its choices, one a group."""

    def __init__(
        self, problem: Problem, plan: Plan, chosen: Sequence[int], n_layers: int, *, tied: bool
    ) -> None:
        assert plan.division is not None
        self._division, self._memory = plan.division, plan.memory
        pools = Pools(
            (DivisionRoom(self._division, None, None),), n_layers, tied, plan.division.cpu_formats
        )
        self._pooled, self._chosen = PooledProblem(problem, pools), list(chosen)
        self._allowed = self._pooled.allowed(self._division)
        self._on_cpu = self._pooled.on_cpu(self._division)
        self._grown = np.zeros(2, np.int64)
        # Of what the CPU multiplies, the GPU copies one tensor at a time: none may become larger.
        self._largest = max(
            (self._taken(g, j)[0] for g, j in enumerate(chosen) if self._on_cpu[g]), default=0
        )

    def _taken(self, group: int, choice: int) -> tuple[int, int]:
        return self._pooled.taken(self._division, group, choice)

    def _change(self, changes: Changes) -> NDArray[np.int64]:
        return np.array(
            [
                sum(self._taken(g, j)[k] - self._taken(g, self._chosen[g])[k] for g, j in changes)
                for k in (0, 1)
            ],
            np.int64,
        )

    @property
    def _left(self) -> tuple[int, int]:
        """What is left of both memories; without a record, nothing beyond what the plan takes."""
        memory = self._memory
        if memory is None:
            return 0, 0
        return _left(memory.limit, memory.ram), _left(memory.vram_limit, memory.vram)

    def allows(self, changes: Changes) -> bool:
        """Return whether the plan still fits both memories, in the CPU's formats, after changes."""
        for group, choice in changes:
            if choice not in self._allowed[group]:
                return False
            if self._on_cpu[group] and self._taken(group, choice)[0] > self._largest:
                return False
        return bool((self._grown + self._change(changes) <= self._left).all())

    def take(self, changes: Changes) -> None:
        """Make the changes."""
        self._grown += self._change(changes)
        for group, choice in changes:
            self._chosen[group] = choice

    def memory(self) -> MemoryBudget | None:
        """Return the plan's record of memory after the changes."""
        if self._memory is None:
            return None
        ram, vram = self._memory.ram, self._memory.vram or MemoryUse()
        more = [
            use.model_copy(update={"weights": max(0, use.weights + int(n))})
            for use, n in zip((ram, vram), self._grown, strict=True)
        ]
        return self._memory.model_copy(update={"ram": more[0], "vram": more[1]})


def _left(limit: int | None, use: MemoryUse | None) -> int:
    return UNLIMITED if limit is None else limit - (use or MemoryUse()).total
