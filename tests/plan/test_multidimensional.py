"""The knapsack with limits of seconds beside bytes, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramgguf.plan.knapsack import Choice, smallest, solve
from ramgguf.plan.multidimensional import Resource, solve_within

Items = list[list[Choice]]


def _random(seed: int, n_items: int, n_choices: int) -> tuple[Items, list[list[list[float]]]]:
    rng = np.random.default_rng(seed)
    items: Items = []
    used: list[list[list[float]]] = [[], []]
    for _ in range(n_items):
        weights = int(rng.integers(1, 60)) * 256
        bpw = np.sort(rng.uniform(1.5, 8.5, n_choices))
        costs = weights * rng.lognormal() * 4.0**-bpw
        items.append(
            [Choice(int(weights * b / 8), float(c)) for b, c in zip(bpw, costs, strict=True)]
        )
        for own in used:
            own.append((weights * rng.uniform(0.3, 3, n_choices) / 1e9).tolist())
    return items, used


def _limit(used: list[list[float]], share: float) -> float:
    least, most = sum(map(min, used)), sum(map(max, used))
    return least + share * (most - least)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bytes_share=st.floats(0.05, 1),
    shares=st.lists(st.floats(0.02, 0.9), min_size=1, max_size=2),
)
def test_the_cost_lies_within_its_gap_of_the_best_of_all_selections(
    seed: int, bytes_share: float, shares: list[float]
) -> None:
    items, used = _random(seed, 5, 4)
    least, most = smallest(items), sum(max(c.n_bytes for c in item) for item in items)
    capacity = int(least + bytes_share * (most - least))
    resources = [
        Resource(own, _limit(own, share)) for own, share in zip(used, shares, strict=False)
    ]
    best = min(
        (
            sum(item[j].cost for item, j in zip(items, chosen, strict=True))
            for chosen in itertools.product(range(4), repeat=5)
            if sum(item[j].n_bytes for item, j in zip(items, chosen, strict=True)) <= capacity
            and all(r.fits(chosen) for r in resources)
        ),
        default=None,
    )
    found = solve_within(items, capacity, resources)
    if best is None:
        assert found is None
    elif found is not None:  # nothing may be found though something is there: rounding failed
        assert found.n_bytes <= capacity
        assert all(r.fits(found.chosen) for r in resources)
        assert best <= found.cost * (1 + 1e-9)
        assert found.cost * (1 - found.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_with_many_items_the_proven_gap_is_small(seed: int) -> None:
    items, used = _random(seed, 150, 10)
    least, most = smallest(items), sum(max(c.n_bytes for c in item) for item in items)
    capacity = int(least + 0.5 * (most - least))
    resources = [Resource(own, _limit(own, 0.25)) for own in used]
    alone = solve(items, capacity)
    assert not all(r.fits(alone.chosen) for r in resources)
    found = solve_within(items, capacity, resources)
    assert found is not None
    assert found.n_bytes <= capacity
    assert all(r.fits(found.chosen) for r in resources)
    assert alone.cost < found.cost
    assert found.gap < 2e-3
    assert solve_within(items, capacity, resources) == found


def test_limits_that_do_not_bind_leave_the_knapsack_of_bytes() -> None:
    items, used = _random(7, 40, 6)
    capacity = int(1.3 * smallest(items))
    assert solve_within(items, capacity, [Resource(used[0], 1e9)]) == solve(items, capacity)


def test_what_cannot_be_kept_has_no_solution() -> None:
    items, used = _random(8, 20, 5)
    least = sum(map(min, used[0]))
    assert solve_within(items, 10**9, [Resource(used[0], 0.99 * least)]) is None
    assert solve_within(items, smallest(items) - 1, [Resource(used[0], 1e9)]) is None
    exact = solve_within(items, 10**9, [Resource(used[0], least)])
    assert exact is not None
    assert [own[j] for own, j in zip(used[0], exact.chosen, strict=True)] == list(map(min, used[0]))
