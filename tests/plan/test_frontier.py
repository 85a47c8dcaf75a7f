"""The frontier: every step optimal, no gap understated, and the same plans as the solver's."""

import io
import itertools
import json
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ramgguf
from ramgguf.core.errors import BudgetError
from ramgguf.plan.frontier import knees
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.knapsack import Choice, hull
from ramgguf.report.frontier import cost_at, curve_svg, print_curve, remarks, rows
from ramgguf.report.plans import print_plan
from ramgguf.report.terminal import PlainConsole
from synthetic import measurement

MODEL = measurement()
FRONTIER = ramgguf.curve(MODEL)


def test_every_step_is_the_solver_s_optimum_of_its_size() -> None:
    for step in FRONTIER.steps[:: len(FRONTIER.steps) // 12]:
        on_curve, solved = (
            ramgguf.plan(FRONTIER, step.n_bytes),
            ramgguf.plan(MODEL, step.n_bytes),
        )
        assert on_curve.gap == pytest.approx(0, abs=1e-9)
        assert on_curve.n_bytes == step.n_bytes
        assert on_curve.total_cost == pytest.approx(solved.total_cost, rel=2e-6)
        assert on_curve.total_cost == pytest.approx(step.cost, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1))
def test_between_steps_the_gap_covers_what_the_solver_still_finds(share: float) -> None:
    start, end = FRONTIER.start_bytes, FRONTIER.end_bytes
    budget = start + int(share * (end - start))
    on_curve, solved = ramgguf.plan(FRONTIER, budget), ramgguf.plan(MODEL, budget)
    assert on_curve.n_bytes <= budget
    assert on_curve.total_cost >= solved.total_cost * (1 - 1e-9)
    assert on_curve.total_cost * (1 - on_curve.gap) <= solved.total_cost * (1 + 1e-9)
    assert on_curve.gap < 0.2  # few tensors, and the embedding a large part of the file


def test_prices_fall_and_costs_with_them() -> None:
    prices = [s.price for s in FRONTIER.steps]
    assert all(a >= b > 0 for a, b in itertools.pairwise(prices))
    costs = [FRONTIER.start_cost, *(s.cost for s in FRONTIER.steps)]
    assert all(a > b for a, b in itertools.pairwise(costs))


def test_it_starts_at_the_smallest_safe_size_and_ends_below_eight_and_a_half_bits() -> None:
    with pytest.raises(BudgetError, match=str(FRONTIER.start_bytes)):
        ramgguf.plan(MODEL, FRONTIER.start_bytes - 1)
    with pytest.raises(BudgetError, match="frontier's start"):
        ramgguf.plan(FRONTIER, FRONTIER.start_bytes - 1)
    assert 8.0 < FRONTIER.bpw(FRONTIER.end_bytes) <= 8.5
    beyond = ramgguf.plan(FRONTIER, 10 * FRONTIER.end_bytes)
    assert beyond.n_bytes == FRONTIER.end_bytes
    assert beyond.gap > 0.5  # much more would fit, and the plan does not claim otherwise


def test_it_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "frontier.json"
    FRONTIER.save(path)
    again = Frontier.load(path)
    assert again == FRONTIER
    assert ramgguf.plan(again, "60%").sha256() == ramgguf.plan(FRONTIER, "60%").sha256()


def test_a_thousand_tensors_take_seconds() -> None:
    large = measurement(n_layers=140)
    assert len(large.tensors) > 1000
    start = time.perf_counter()
    made = ramgguf.curve(large)
    ramgguf.plan(made, made.end_bytes * 2 // 3)
    assert time.perf_counter() - start < 5


def _least_line(choices: list[Choice], n_bytes: float) -> float:
    """Return the lowest cost at a size on any segment between two choices, by brute force."""
    best = min((c.cost for c in choices if c.n_bytes <= n_bytes), default=np.inf)
    for a, b in itertools.permutations(choices, 2):
        if a.n_bytes <= n_bytes < b.n_bytes:
            share = (n_bytes - a.n_bytes) / (b.n_bytes - a.n_bytes)
            best = min(best, a.cost + share * (b.cost - a.cost))
    return float(best)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.builds(Choice, st.integers(1, 30), st.integers(0, 30).map(float)), min_size=1, max_size=8
    )
)
def test_the_hull_is_the_lowest_line_through_the_choices(choices: list[Choice]) -> None:
    kept = [choices[j] for j in hull(choices)]
    assert kept[0].n_bytes == min(c.n_bytes for c in choices)
    assert kept[-1].cost == min(c.cost for c in choices)
    for n_bytes in range(kept[0].n_bytes, kept[-1].n_bytes + 1):
        line = np.interp(n_bytes, [c.n_bytes for c in kept], [c.cost for c in kept])
        assert line == pytest.approx(_least_line(choices, n_bytes))
    slopes = [(a.cost - b.cost) / (b.n_bytes - a.n_bytes) for a, b in itertools.pairwise(kept)]
    assert all(a > b for a, b in itertools.pairwise(slopes))


def test_a_bend_in_the_curve_is_a_knee_and_a_smooth_one_has_none() -> None:
    step = FRONTIER.steps[0]
    sizes = np.linspace(1e6, 2e6, 200)
    bent = np.where(
        sizes < 1.4e6, np.exp(-sizes / 1e5), np.exp(-1.4e6 / 1e5 - (sizes - 1.4e6) / 1e6)
    )
    smooth = np.exp(-3 * np.log(sizes / 1e6))
    for costs, expected in ((bent, 1), (smooth, 0)):
        made = [
            step.model_copy(update={"n_bytes": int(n), "cost": float(c)})
            for n, c in zip(sizes, costs, strict=True)
        ]
        found = knees(made[0].n_bytes, made[0].cost, made[1:])
        assert len(found) == expected
        assert all(abs(made[1:][k].n_bytes - 1.4e6) < 0.02e6 for k in found)


def test_the_table_has_the_plans_asked_for_and_the_bound_is_no_higher_than_the_plan() -> None:
    plan = ramgguf.plan(FRONTIER, "40%")
    marked = {row.n_bytes: row.mark for row in rows(FRONTIER, [plan])}
    assert marked[plan.n_bytes].startswith("asked for")
    assert marked[FRONTIER.start_bytes] == "smallest"
    assert FRONTIER.end_bytes in marked
    bound = cost_at(FRONTIER, plan.n_bytes)
    assert bound is not None
    assert plan.total_cost * 0.99 < bound <= plan.total_cost * (1 + 1e-9)
    assert cost_at(FRONTIER, FRONTIER.start_bytes - 1) is None
    assert cost_at(FRONTIER, FRONTIER.end_bytes + 1) is None


def test_beyond_its_end_the_curve_claims_nothing() -> None:
    beyond = ramgguf.plan(FRONTIER, 2 * FRONTIER.end_bytes)
    assert any("the frontier ends at" in note for note in beyond.notes)
    (line,) = [line for line in remarks(FRONTIER, [beyond]) if line.startswith("asked for")]
    assert "`ramgguf plan` makes larger plans" in line
    assert "proven" not in line
    within = ramgguf.plan(FRONTIER, FRONTIER.end_bytes)
    assert not any("the frontier ends at" in note for note in within.notes)


def test_neither_curve_nor_plan_shows_an_interval_or_a_kld_that_nobody_measured() -> None:
    plan = ramgguf.plan(FRONTIER, "40%")
    out = PlainConsole(record=True, file=io.StringIO())
    print_curve(FRONTIER, [plan], out)
    print_plan(plan, out)
    told = out.export_text() + curve_svg(FRONTIER, [plan])
    for word in ("95 %", "predict", "KLD", "PPL"):
        assert word not in told, word


def test_a_curve_that_older_versions_saved_with_predictions_is_read(tmp_path: Path) -> None:
    old = json.loads(FRONTIER.to_json())
    old["predictions"], old["predicted_from"] = [{"kld": 1.0}], "priors"
    path = tmp_path / "old.frontier.json"
    path.write_text(json.dumps(old))
    assert Frontier.load(path) == FRONTIER


def test_the_picture_is_svg_that_marks_knees_and_plans() -> None:
    plan = ramgguf.plan(FRONTIER, "40%")
    root = ElementTree.fromstring(curve_svg(FRONTIER, [plan]))
    space = ".//{http://www.w3.org/2000/svg}"
    line = root.find(f"{space}polyline")
    assert line is not None
    assert len(line.attrib["points"].split()) == len(FRONTIER.steps) + 1
    assert len(root.findall(f"{space}circle")) == len(FRONTIER.knees) + 1
