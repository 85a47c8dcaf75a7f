"""The allocator against exhaustive search, and the properties every plan must have."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from ramgguf.core.errors import BudgetError
from ramgguf.plan.knapsack import Choice, smallest, solve

choices = st.builds(
    Choice, n_bytes=st.integers(0, 400), cost=st.floats(0, 1e6, allow_subnormal=False)
)
problems = st.tuples(
    st.lists(st.lists(choices, min_size=1, max_size=5), min_size=1, max_size=5),
    st.floats(0, 1.1),
)


def exhaustive(items: list[list[Choice]], capacity: int) -> float:
    return min(
        sum(c.cost for c in taken)
        for taken in itertools.product(*items)
        if sum(c.n_bytes for c in taken) <= capacity
    )


@settings(max_examples=300, deadline=None)
@given(problems)
def test_no_selection_is_cheaper_than_the_solution(
    problem: tuple[list[list[Choice]], float],
) -> None:
    items, fraction = problem
    low, high = smallest(items), sum(max(c.n_bytes for c in item) for item in items)
    capacity = low + int(fraction * (high - low))
    best = exhaustive(items, capacity)
    solution = solve(items, capacity)
    assert solution.n_bytes <= capacity
    taken = [item[j] for item, j in zip(items, solution.chosen, strict=True)]
    assert sum(c.n_bytes for c in taken) == solution.n_bytes
    assert sum(c.cost for c in taken) == pytest.approx(solution.cost)
    assert solution.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.cost * (1 - solution.gap) <= best * (1 + 1e-9) + 1e-9  # the bound is a bound


@settings(max_examples=100, deadline=None)
@given(problems)
def test_cost_never_rises_with_the_budget(problem: tuple[list[list[Choice]], float]) -> None:
    items, fraction = problem
    low = smallest(items)
    costs = [solve(items, low + extra).cost for extra in (0, int(100 * fraction), 500, 10_000)]
    assert all(b <= a * (1 + 1e-9) + 1e-9 for a, b in itertools.pairwise(costs))


def test_a_capacity_below_the_smallest_selection_is_an_error() -> None:
    items = [[Choice(10, 1.0)], [Choice(20, 2.0), Choice(30, 0.0)]]
    assert solve(items, 30).chosen == (0, 0)
    with pytest.raises(BudgetError, match="30"):
        solve(items, 29)


def like_a_model(
    n_tensors: int, seed: int, *, symmetric: bool = False, n_formats: int = 14
) -> list[list[Choice]]:
    """Return tensors of a few shapes; symmetric ones lose alike in every format, up to 1 %."""
    rng = np.random.default_rng(seed)
    bpw = np.sort(np.append(rng.choice(BPW, n_formats - 1, replace=False), 16.0))
    items = []
    for _ in range(n_tensors):
        n = int(rng.choice([768 * 192, 768 * 768, 768 * 1536, 4096 * 4096]))
        spread = 0.005 if symmetric else 0.2
        alpha = n if symmetric else n * rng.lognormal(0, 1.5)
        noise = rng.uniform(1 - spread, 1 + spread, n_formats)
        cost = np.where(bpw == 16, 0.0, alpha * 4.0**-bpw * noise)
        items.append([Choice(int(n * b / 8), float(c)) for b, c in zip(bpw, cost, strict=True)])
    return items


BPW = (1.75, 2.0625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 4.5, 5.0, 5.5, 5.5, 6.0, 6.5625, 8.5)


@pytest.mark.parametrize("fraction", [0.18, 0.28, 0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_thousand_tensors_are_solved_to_proven_optimality_in_seconds(
    fraction: float, symmetric: bool
) -> None:
    for seed in range(2):  # five, and the times, are in bench/allocation_speed.py
        items = like_a_model(1000, seed, symmetric=symmetric)
        capacity = int(fraction * sum(item[-1].n_bytes for item in items))
        start = time.process_time()
        solution = solve(items, capacity)
        assert time.process_time() - start < 2
        assert solution.gap == 0
        assert 0.999 * capacity < solution.n_bytes <= capacity


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fraction", [0.17, 0.2, 0.3, 0.45])
def test_branch_and_bound_by_another_solver_finds_nothing_cheaper(
    fraction: float, symmetric: bool
) -> None:
    items = like_a_model(30, seed=4, symmetric=symmetric, n_formats=8)
    capacity = int(fraction * sum(item[-1].n_bytes for item in items))
    capacity = max(capacity, smallest(items) + 10**6)
    solution = solve(items, capacity)
    assert solution.gap == 0
    rival = by_highs(items, capacity)
    assert solution.cost <= rival * (1 + 1e-9)
    assert solution.cost >= rival * (1 - 1e-3)  # both are what they claim


def by_highs(items: list[list[Choice]], capacity: int) -> float:
    """Return the cost of the selection that scipy's HiGHS finds within half a second."""
    item = np.repeat(np.arange(len(items)), [len(i) for i in items])
    n_bytes = np.array([c.n_bytes for i in items for c in i], np.float64)
    cost = np.array([c.cost for i in items for c in i])
    one_each = (item[None, :] == np.arange(len(items))[:, None]).astype(np.float64)
    found = milp(
        cost / cost.max(),
        constraints=LinearConstraint(
            np.vstack([one_each, n_bytes / capacity]),
            np.append(np.ones(len(items)), -np.inf),
            np.ones(len(items) + 1),
        ),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0, "time_limit": 0.5},
    )
    assert found.x is not None
    taken = found.x > 0.5
    assert n_bytes[taken].sum() <= capacity * (1 + 1e-6)
    return float(cost[taken].sum())


@settings(max_examples=100, deadline=None)
@given(problems, st.integers(1, 4))
def test_a_search_with_little_space_still_proves_a_true_bound(
    problem: tuple[list[list[Choice]], float], max_states: int
) -> None:
    items, fraction = problem
    low, high = smallest(items), sum(max(c.n_bytes for c in item) for item in items)
    capacity = low + int(fraction * (high - low))
    best = exhaustive(items, capacity)
    solution = solve(items, capacity, max_states=max_states)
    assert solution.n_bytes <= capacity
    assert best * (1 - 1e-9) - 1e-9 <= solution.cost
    assert solution.cost * (1 - solution.gap) <= best * (1 + 1e-9) + 1e-9


def test_a_problem_too_hard_for_its_space_says_how_near_it_came() -> None:
    """Costs that are nearly the bytes themselves: nothing is dominated, and every sum counts."""
    rng = np.random.default_rng(0)
    items = [
        [
            Choice(int(n), 1e9 - float(n) + float(rng.uniform(0, 1e3)))
            for n in rng.integers(1, 10**6, 6)
        ]
        for _ in range(60)
    ]
    capacity = 60 * 500_000 + 1
    start = time.process_time()
    solution = solve(items, capacity, max_states=2000)
    assert time.process_time() - start < 5
    assert solution.n_bytes <= capacity
    assert 0 <= solution.gap < 1e-6
