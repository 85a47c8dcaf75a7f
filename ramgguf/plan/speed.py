"""Speed as a limit of plans: how long a token takes, from the speed of formats.

A token takes the sum over tensors of the weights that it is multiplied with times what a weight of
the format takes, and what layers take besides. Generation reads the experts that are active and the
head; a prompt's token has no logits but at the end. Attention over the context is not counted: the
speed of a file that was timed corrects what is predicted.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import BudgetError
from ramgguf.gguf.architecture import HEAD, TOKEN_EMBEDDING, is_looked_up, is_of_experts, layer_of
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.format_speed import FormatRate, SpeedProfile
from ramgguf.plan.knapsack import Choice, Solution, solve
from ramgguf.plan.multidimensional import Resource, solve_within
from ramgguf.plan.problem import Group, Problem
from ramgguf.plan.result import Assignment, PlannedSpeed

N_PROMPT = 512  # tokens of a prompt, as `check` times it
_NOTABLY = 1.005


@dataclass(frozen=True)
class TokenWork:
    """How often a token is multiplied with each weight of a tensor.

    generation and prompt are by tensor, between 0 and 1; what is not named counts as 1.
    """

    n_layers: int
    generation: Mapping[str, float]
    prompt: Mapping[str, float]

    @classmethod
    def of(cls, file: GGUFFile) -> "TokenWork":
        """Return that of an open model: of experts, those that a token uses."""
        n_experts = file.metadata.integer(f"{file.architecture}.expert_count") or 0
        n_used = file.metadata.integer(f"{file.architecture}.expert_used_count") or 0
        used = min(1.0, n_used / n_experts) if n_experts else 1.0
        tied, n_layers = file.has_tied_embedding, file.n_trunk_layers or 0
        generation, prompt = {}, {}
        for tensor in file.tensors:
            layer = layer_of(tensor.name)
            is_draft = layer is not None and layer >= n_layers
            is_head = tensor.name == HEAD or (tied and tensor.name == TOKEN_EMBEDDING)
            share = used if is_of_experts(tensor.name) else 1.0
            if is_draft or is_looked_up(tensor.name, tied=tied) or len(tensor.shape) < 2:
                share = 0.0
            generation[tensor.name] = share
            prompt[tensor.name] = share / N_PROMPT if is_head else share
        return cls(n_layers, generation, prompt)


@dataclass(frozen=True)
class SpeedLimit:
    """The least tokens per second of generation and of prompts (0: no limit) on a machine.

    Predictions are divided by slowdown and prompt_slowdown, once a file was timed that took longer.
    """

    profile: SpeedProfile
    work: TokenWork
    generation: float = 0.0
    prompt: float = 0.0
    slowdown: float = 1.0
    prompt_slowdown: float = 1.0

    @cached_property
    def _slowest(self) -> FormatRate:
        rates = self.profile.rates.values()
        return FormatRate(
            generation=max(r.generation for r in rates), prompt=max(r.prompt for r in rates)
        )

    def corrected(self, slowdown: float, prompt_slowdown: float) -> "SpeedLimit":
        """Return the limit with what was predicted corrected by what was measured."""
        return replace(self, slowdown=slowdown, prompt_slowdown=prompt_slowdown)

    def without(self, names: Iterable[str]) -> "SpeedLimit":
        """Return the limit for which these tensors, those of a projector, take no time."""
        none, work = dict.fromkeys(names, 0.0), self.work
        generation, prompt = {**work.generation, **none}, {**work.prompt, **none}
        return replace(self, work=TokenWork(work.n_layers, generation, prompt))

    def knows(self, format_name: str) -> bool:
        """Return whether the format's speed is known here."""
        return format_name in self.profile.rates

    def seconds(self, name: str, n_weights: int, format_name: str) -> tuple[float, float]:
        """Return what a tensor in a format takes for a generated token and a prompt's token.

        A format that was not timed counts as the slowest.
        """
        rate = self.profile.rates.get(format_name, self._slowest)
        return (
            self.slowdown * rate.generation * n_weights * self.work.generation.get(name, 1.0),
            self.prompt_slowdown * rate.prompt * n_weights * self.work.prompt.get(name, 1.0),
        )

    @property
    def fixed(self) -> tuple[float, float]:
        """What layers take besides their weights."""
        n, profile = self.work.n_layers, self.profile
        return (
            self.slowdown * n * profile.layer_seconds,
            self.prompt_slowdown * n * profile.layer_prompt_seconds,
        )

    def predicted(self, formats: Iterable[tuple[str, int, str]]) -> tuple[float, float]:
        """Return tokens per second of generation and prompts: of tensors, weights and formats."""
        both = [self.seconds(*tensor) for tensor in formats]
        generation, prompt = self.fixed
        return (
            1 / (generation + sum(s for s, _ in both)),
            1 / (prompt + sum(s for _, s in both)),
        )

    def planned(self, assignments: Sequence[Assignment]) -> PlannedSpeed:
        """Return what a plan says of its speed."""
        generation, prompt = self.predicted((a.name, a.n_weights, a.format) for a in assignments)
        return PlannedSpeed(
            least_generation=self.generation,
            least_prompt=self.prompt,
            generation=generation,
            prompt=prompt,
            cpu=self.profile.cpu,
            n_threads=self.profile.n_threads,
            engine=self.profile.engine,
        )


class TimedProblem:
    """A plan's knapsack without choices whose speed is unknown, and with the seconds of others."""

    def __init__(self, problem: Problem, limit: SpeedLimit) -> None:
        self._limit, self._measurement = limit, problem.measurement
        self._groups = problem.groups
        self.kept = [list(self._known(group)) for group in problem.groups]
        self.items = [
            tuple(group.choices[j] for j in kept)
            for group, kept in zip(problem.groups, self.kept, strict=True)
        ]
        seconds = [
            [self._seconds(group, j) for j in kept]
            for group, kept in zip(problem.groups, self.kept, strict=True)
        ]
        fixed = limit.fixed
        self._used = [[[s[k] for s in item] for item in seconds] for k in (0, 1)]
        self._room = [
            1 / least - fixed[k] if least > 0 else float("inf")
            for k, least in enumerate((limit.generation, limit.prompt))
        ]

    def _known(self, group: Group) -> Iterator[int]:
        known = [
            j
            for j, row in enumerate(group.points)
            if all(self._limit.knows(point.format) for point in row)
        ]
        yield from known or range(len(group.points))

    def _seconds(self, group: Group, j: int) -> tuple[float, float]:
        tensors = self._measurement.tensors
        both = [
            self._limit.seconds(tensors[i].name, tensors[i].n_weights, point.format)
            for i, point in zip(group.members, group.points[j], strict=True)
        ]
        return sum(s for s, _ in both), sum(s for _, s in both)

    @property
    def resources(self) -> list[Resource]:
        """The limits of seconds; those that are not asked for are none."""
        return [
            Resource(used, room)
            for used, room in zip(self._used, self._room, strict=True)
            if room != float("inf")
        ]

    def fastest(self, k: int, capacity: int | None = None) -> float:
        """Return the most tokens per second, of generation (0) or prompts (1), within bytes."""
        timed = [
            [Choice(c.n_bytes, seconds) for c, seconds in zip(item, used, strict=True)]
            for item, used in zip(self.items, self._used[k], strict=True)
        ]
        if capacity is None:
            least = sum(min(c.cost for c in item) for item in timed)
        else:
            least = solve(timed, capacity).cost
        return 1 / (least + self._limit.fixed[k])

    def solved(self, capacity: int) -> Solution:
        """Return the cheapest selection within bytes and seconds, by the problem's indices.

        Raises BudgetError when none is found.
        """
        found = solve_within(self.items, capacity, self.resources)
        if found is None:
            raise self._not_together(capacity)
        return replace(found, chosen=self._of_problem(found.chosen))

    def _of_problem(self, chosen: Iterable[int]) -> tuple[int, ...]:
        """Return the problem's own indices of choices, one for each group."""
        return tuple(kept[j] for kept, j in zip(self.kept, chosen, strict=True))

    def chosen(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the problem's choices in these rows of `columns`, one for each group."""
        return self._of_problem(k - start for k, start in zip(rows, self._starts, strict=True))

    def columns(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return cost, bytes and both seconds of every choice, and where each group's begin."""
        rows = [
            (c.cost, c.n_bytes, *seconds)
            for item, *used in zip(self.items, *self._used, strict=True)
            for c, *seconds in zip(item, *used, strict=True)
        ]
        return np.array(rows, np.float64), np.array(self._starts, np.intp)

    @property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(len(item) for item in self.items[:-1])]

    def planned(self, assignments: Sequence[Assignment]) -> PlannedSpeed:
        """Return what the plan says of its speed."""
        return self._limit.planned(assignments)

    def binds(self, capacity: int, solution: Solution) -> bool:
        """Return whether the seconds, not the bytes, keep the plan from being better."""
        alone = solve(self.items, capacity)
        return alone.cost < solution.cost * (1 - solution.gap)

    def notes(self) -> Iterator[str]:
        """Yield what is left out for its speed."""
        refused = sorted(
            {name for name in self._measurement.formats if name in self._limit.profile.refused}
        )
        if refused:
            yield f"left out, for the llama.cpp here cannot run them: {', '.join(refused)}"

    def require_reachable(self, capacity: int, bare: "TimedProblem | None") -> None:
        """Raise BudgetError unless each limit of speed can be kept by itself.

        It says what is possible and what limits it; bare is the problem without a floor of SQNR.
        """
        for k, (least, what) in enumerate(
            ((self._limit.generation, "generation"), (self._limit.prompt, "prompts"))
        ):
            if least == 0 or least <= (fastest := self.fastest(k, capacity)):
                continue
            raise BudgetError(
                f"{what} at {least:g} tokens/s is out of reach: the fastest plan within these "
                f"bytes makes about {fastest:.3g} on {self._limit.profile.machine}. "
                + self._why(k, capacity, fastest, bare)
            )

    def _not_together(self, capacity: int) -> BudgetError:
        """Return the error of limits that can be kept one by one, but not together."""
        both = [self.fastest(k, capacity) for k in (0, 1)]
        return BudgetError(
            f"no plan within these bytes was found that generates {self._limit.generation:g} "
            f"tokens/s and reads prompts at {self._limit.prompt:g} tokens/s: one by one, "
            f"{both[0]:.3g} and {both[1]:.3g} are possible; lower one of them"
        )

    def _why(self, k: int, capacity: int, fastest: float, bare: "TimedProblem | None") -> str:
        """Return what limits the speed: bytes, the floor, what has no choice, what is large."""
        alternatives = []
        if (unbound := self.fastest(k)) > _NOTABLY * fastest:
            alternatives.append(f"with more bytes it is {unbound:.3g}")
        if bare is not None and (without := bare.fastest(k, capacity)) > _NOTABLY * fastest:
            alternatives.append(f"without the floor of SQNR (--min-sqnr 0) it is {without:.3g}")
        least = [min(used) for used in self._used[k]]
        total, fixed = sum(least) + self._limit.fixed[k], self._limit.fixed[k]
        kept = sum(s for s, item in zip(least, self.items, strict=True) if len(item) == 1)
        largest = max(range(len(least)), key=least.__getitem__)
        tensor = self._measurement.tensors[self._groups[largest].members[0]]
        alternatives.append(
            f"at their fastest, weights take {1 - fixed / total:.0%} of the time, {tensor.name} "
            f"alone {least[largest] / total:.0%}, what has no choice of formats {kept / total:.0%}"
        )
        return "; ".join(alternatives) + ". Ask for less, or allow other --formats"
