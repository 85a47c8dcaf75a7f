"""Two memories at once: where the layers lie, and every tensor's format, decided together.

llama.cpp's options divide a model in few ways; each is tried. With the division fixed, a tensor
lies in RAM or on the GPU, so that the knapsack falls apart into one for each. The few tensors that
take bytes of both (a tied embedding) are tried in each of their formats; where the file is limited
as well, or many tensors are in both, it is a knapsack with several limits.

Most divisions are never solved. Their linear relaxation, which is one sum along the convex hulls,
bounds their cost from below; the most promising one is solved first, and what cannot be cheaper is
left out. Of those that cost the same, the one with the most weights on the GPU is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import BudgetError
from ramgguf.core.units import format_count
from ramgguf.gguf.layout import padded
from ramgguf.plan.division import Sites
from ramgguf.plan.envelope import Envelope, least_of_both
from ramgguf.plan.knapsack import ROUNDING, Choice, Solution, efficient, solve
from ramgguf.plan.multidimensional import Resource, solve_within
from ramgguf.plan.problem import Group, Problem
from ramgguf.plan.result import Division

UNLIMITED = 1 << 62
_SAME = 1e-9  # relative: costs are sums of some thousand doubles
_RAM, _VRAM, _BOTH = 0, 1, 2


@dataclass(frozen=True)
class DivisionRoom:
    """A division of the model, and the bytes that it leaves for weights; None is no limit."""

    division: Division
    ram: int | None
    vram: int | None


@dataclass(frozen=True)
class Pools:
    """The divisions to choose from, and what decides where tensors lie.

    cpu_formats are those that the CPU's tensors shall have, None any; a tensor that none of them
    suits may have all others.
    """

    rooms: tuple[DivisionRoom, ...]
    n_layers: int
    tied: bool
    cpu_formats: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Case:
    """A division, with a choice fixed for the group that takes bytes of both memories, if one does.

    bound is below the cost of every selection; n_offloaded are the weights on the GPU.
    """

    room: int
    fixed: int | None
    bound: float
    n_offloaded: int


@dataclass(frozen=True)
class _Taken:
    """Bytes of RAM, of the GPU and of the file, and cost."""

    ram: int
    vram: int
    n_bytes: int
    cost: float


@dataclass(frozen=True)
class _DividedGroups:
    """What a division makes of the groups.

    side is where each lies; on_cpu whether the CPU multiplies it; allowed the indices of choices
    that it may take; crossing are the groups in both memories.
    """

    side: NDArray[np.int8]
    on_cpu: NDArray[np.bool_]
    allowed: Sequence[Sequence[int]]
    crossing: tuple[int, ...]
    n_offloaded: int
    ram: int
    vram: int


class PooledProblem:
    """A plan's knapsack with a limit for each memory."""

    def __init__(self, problem: Problem, pools: Pools) -> None:
        self._problem, self._pools = problem, pools
        names = [c.tensor.name for c in problem.candidates]
        self._sites = Sites.of(names, pools.n_layers, tied=pools.tied)
        self._n_weights = np.array([c.tensor.n_weights for c in problem.candidates], np.int64)
        self._starts = np.cumsum([0, *(len(g.members) for g in problem.groups[:-1])])
        self._members = np.concatenate([np.array(g.members) for g in problem.groups])
        self._any = [tuple(range(len(g.choices))) for g in problem.groups]
        self._suiting = [self._suited(g) for g in problem.groups]
        self._fast = [f or own for f, own in zip(self._suiting, self._any, strict=True)]
        items = problem.items
        self._free = Envelope.of(items, self._any)
        self._bound = Envelope.of(items, self._fast)

    def allowed(self, division: Division) -> list[tuple[int, ...]]:
        """Return the choices that each group may take in a division."""
        on_cpu = self.on_cpu(division)
        return [
            fast if bound else own
            for bound, fast, own in zip(on_cpu, self._fast, self._any, strict=True)
        ]

    def on_cpu(self, division: Division) -> NDArray[np.bool_]:
        """Return of which groups the CPU multiplies a tensor."""
        return self._of_groups(self._sites.on_cpu(division))

    def _suited(self, group: Group) -> tuple[int, ...]:
        """Return the choices of a group whose members the CPU's formats suit."""
        allowed, candidates = self._pools.cpu_formats, self._problem.candidates
        return tuple(
            j
            for j, row in enumerate(group.points)
            if all(
                allowed is None
                or candidates[i].note is not None
                or point.format in allowed
                or point.format == candidates[i].tensor.grid
                for i, point in zip(group.members, row, strict=True)
            )
        )

    def solved(self, capacity: int) -> tuple[Solution, Division]:
        """Return the cheapest selection of at most so many bytes of file, and its division.

        Raises BudgetError, with the bytes of the smallest file, where none fits.
        """
        divisions = [self._divided(room) for room in self._pools.rooms]
        cases = sorted(
            (case for k, d in enumerate(divisions) for case in self._cases(k, d, capacity)),
            key=lambda case: (case.bound, -case.n_offloaded, case.room),
        )
        # Costs are sums of thousands: what differs by less than the largest's rounding is the same.
        rounding = ROUNDING * sum(max(c.cost for c in item) for item in self._problem.items)
        best: tuple[Solution, _Case] | None = None
        least, lower = np.inf, np.inf
        for case in cases:
            if case.bound > least * (1 + _SAME) + rounding:
                lower = min(lower, case.bound)
                break
            more = best is None or case.n_offloaded > best[1].n_offloaded
            if case.bound >= least * (1 - _SAME) - rounding and not more:
                lower = min(lower, case.bound)
                continue
            found, proven = self._solved(divisions[case.room], case, capacity)
            lower = min(lower, max(case.bound, proven))
            if found is None:
                continue
            same = least * (1 + max(_SAME, found.gap)) + rounding
            if found.cost < least * (1 - _SAME) - rounding or (more and found.cost <= same):
                best = found, case
            least = min(least, found.cost)
        if best is None:
            raise self._too_small(divisions)
        solution, case = best
        gap = max(0.0, 1 - lower / solution.cost) if solution.cost > 0 else 0.0
        division = self._pools.rooms[case.room].division
        division = division.model_copy(update={"cpu_formats": self._pools.cpu_formats})
        gap = gap if gap > 10 * _SAME else 0.0
        return Solution(solution.chosen, solution.n_bytes, solution.cost, gap), division

    def notes(self, division: Division) -> Iterator[str]:
        """Yield which formats the CPU's side was chosen from, and how many tensors none suits."""
        on_cpu = self.on_cpu(division)
        free = [
            g
            for g, group in enumerate(self._problem.groups)
            if on_cpu[g] and self._problem.candidates[group.members[0]].note is None
        ]
        if division.cpu_formats is None or not free:
            return
        names = ", ".join(division.cpu_formats)
        yield f"formats of what the CPU multiplies were chosen from {names} (--cpu-formats)"
        unsuited = [g for g in free if not self._suiting[g]]
        if n := sum(len(self._problem.groups[g].members) for g in unsuited):
            yield (
                f"none of these suits {format_count(n, 'tensor')} on the CPU's side: any format "
                "was allowed"
            )

    def _of_groups(self, tensors: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which groups have one of the tensors."""
        found: NDArray[np.bool_] = np.logical_or.reduceat(tensors[self._members], self._starts)
        return found

    def _divided(self, room: DivisionRoom) -> _DividedGroups:
        division = room.division
        vram, ram = self._sites.in_vram(division), self._sites.in_ram(division)
        has_vram, has_ram = self._of_groups(vram), self._of_groups(ram)
        side = np.where(has_vram & has_ram, _BOTH, np.where(has_vram, _VRAM, _RAM)).astype(np.int8)
        return _DividedGroups(
            side=side,
            on_cpu=self.on_cpu(division),
            allowed=self.allowed(division),
            crossing=tuple(np.flatnonzero(side == _BOTH).tolist()),
            n_offloaded=int(self._n_weights[vram].sum()),
            ram=UNLIMITED if room.ram is None else room.ram,
            vram=UNLIMITED if room.vram is None else room.vram,
        )

    def taken(self, division: Division, g: int, j: int) -> tuple[int, int]:
        """Return the bytes of RAM and of the GPU that a group's choice takes."""
        group, alignment = self._problem.groups[g], self._problem.measurement.alignment
        n_bytes = np.array([padded(p.n_bytes, alignment) for p in group.points[j]])
        members = list(group.members)
        ram = self._sites.in_ram(division)[members]
        vram = self._sites.in_vram(division)[members]
        return int(n_bytes[ram].sum()), int(n_bytes[vram].sum())

    def _cases(self, k: int, divided: _DividedGroups, capacity: int) -> Iterator[_Case]:
        """Yield the division once, or with each choice of its one group that is in both memories.

        Those that fit by no means are left out.
        """
        ram, vram = (
            self._free.and_other(
                self._bound,
                (divided.side == side) & ~divided.on_cpu,
                (divided.side == side) & divided.on_cpu,
            )
            for side in (_RAM, _VRAM)
        )
        for fixed, taken in self._crossing(k, divided):
            bound = taken.cost + least_of_both(
                ram,
                vram,
                divided.ram - taken.ram,
                divided.vram - taken.vram,
                capacity - taken.n_bytes,
            )
            if np.isfinite(bound):
                yield _Case(k, fixed, bound, divided.n_offloaded)

    def _crossing(self, k: int, divided: _DividedGroups) -> Iterator[tuple[int | None, _Taken]]:
        """Yield what the groups in both memories take: each choice of one, or the least of many."""
        room, groups = self._pools.rooms[k], divided.crossing
        if len(groups) == 1:
            (g,) = groups
            own = self._allowed(divided, g)
            for i in efficient(own):
                j = divided.allowed[g][i]
                yield j, _Taken(*self.taken(room.division, g, j), own[i].n_bytes, own[i].cost)
            return
        least = _Taken(0, 0, 0, 0.0)
        for g in groups:
            own = self._allowed(divided, g)
            taken = [self.taken(room.division, g, j) for j in divided.allowed[g]]
            least = _Taken(
                least.ram + min(ram for ram, _ in taken),
                least.vram + min(vram for _, vram in taken),
                least.n_bytes + min(c.n_bytes for c in own),
                least.cost + min(c.cost for c in own),
            )
        yield None, least

    def _solved(
        self, divided: _DividedGroups, case: _Case, capacity: int
    ) -> tuple[Solution | None, float]:
        """Return the cheapest selection of a case, and what no selection of it is cheaper than.

        None with an infinite bound where nothing fits; with a finite one where none was found.
        """
        if len(divided.crossing) < 2:
            apart = self._apart(divided, case)
            if apart is None:
                return None, np.inf
            if apart.n_bytes <= capacity:
                return apart, apart.cost * (1 - apart.gap)
        found = self._together(divided, case, capacity)
        return found, case.bound if found is None else found.cost * (1 - found.gap)

    def _apart(self, divided: _DividedGroups, case: _Case) -> Solution | None:
        """Return the cheapest selection with no limit of the file, one memory after the other."""
        items, room = self._problem.items, self._pools.rooms[case.room]
        chosen = [0] * len(items)
        rooms = [divided.ram, divided.vram]
        n_bytes, cost, lower = 0, 0.0, 0.0
        for g in divided.crossing:
            assert case.fixed is not None
            chosen[g] = case.fixed
            n_bytes, cost = items[g][case.fixed].n_bytes, items[g][case.fixed].cost
            lower = cost
            taken = self.taken(room.division, g, case.fixed)
            rooms = [n - t for n, t in zip(rooms, taken, strict=True)]
        for side, n in zip((_RAM, _VRAM), rooms, strict=True):
            groups = np.flatnonzero(divided.side == side).tolist()
            if not groups:
                continue
            try:
                found = solve([self._allowed(divided, g) for g in groups], n)
            except BudgetError:
                return None
            for g, j in zip(groups, found.chosen, strict=True):
                chosen[g] = divided.allowed[g][j]
            n_bytes, cost = n_bytes + found.n_bytes, cost + found.cost
            lower += found.cost * (1 - found.gap)
        return Solution(tuple(chosen), n_bytes, cost, 1 - lower / cost if cost > 0 else 0.0)

    def _allowed(self, divided: _DividedGroups, g: int) -> tuple[Choice, ...]:
        return tuple(self._problem.items[g][j] for j in divided.allowed[g])

    def _together(self, divided: _DividedGroups, case: _Case, capacity: int) -> Solution | None:
        """Return a cheap selection within all limits, those of the file and both memories."""
        room = self._pools.rooms[case.room]
        allowed = [
            (case.fixed,) if case.fixed is not None and g in divided.crossing else own
            for g, own in enumerate(divided.allowed)
        ]
        used: list[list[list[float]]] = [[], []]
        for g, (side, own) in enumerate(zip(divided.side, allowed, strict=True)):
            sizes = [self._problem.items[g][j].n_bytes for j in own]
            both = (
                [self.taken(room.division, g, j) for j in own]
                if side == _BOTH
                else [(n, 0) if side == _RAM else (0, n) for n in sizes]
            )
            for s in (0, 1):
                used[s].append([float(taken[s]) for taken in both])
        resources = [
            Resource(u, float(limit))
            for u, limit in zip(used, (divided.ram, divided.vram), strict=True)
            if limit != UNLIMITED and any(max(item) for item in u)
        ]
        items = [tuple(self._problem.items[g][j] for j in own) for g, own in enumerate(allowed)]
        found = solve_within(items, capacity, resources)
        if found is None:
            return None
        chosen = tuple(own[j] for own, j in zip(allowed, found.chosen, strict=True))
        return Solution(chosen, found.n_bytes, found.cost, found.gap)

    def _too_small(self, divisions: Sequence[_DividedGroups]) -> BudgetError:
        """Return the error of a problem that no division fits, with the smallest file's bytes."""
        overhead = self._problem.measurement.n_overhead_bytes
        smallest = overhead + min(
            sum(
                min(c.n_bytes for c in self._allowed(d, g))
                for g in range(len(self._problem.groups))
            )
            for d in divisions
        )
        return BudgetError(
            f"no division between RAM and GPU leaves enough for the smallest plan, "
            f"{smallest} bytes",
            smallest=smallest,
        )
