"""Plans: what they must never do, and what they say when they cannot be made."""

import itertools
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ramgguf
from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.gguf.layout import padded
from ramgguf.plan.objectives import OBJECTIVES, ram
from ramgguf.plan.priors import ModelShape
from ramgguf.plan.result import Plan
from ramgguf.report.tensor_types import tensor_types
from synthetic import BPW, measurement

MODEL = measurement()
SMALLEST = ramgguf.plan(MODEL, "100%", formats=["Q2_K"], min_sqnr_db=0, pins=[".=Q2_K"]).n_bytes


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(SMALLEST, 8 * SMALLEST),
    name=st.sampled_from(sorted(OBJECTIVES)),
)
def test_a_plan_never_exceeds_its_budget_and_counts_every_byte(budget: int, name: str) -> None:
    plan = ramgguf.plan(MODEL, budget, objective=name, min_sqnr_db=0)
    assert plan.n_bytes <= budget
    assert plan.n_bytes == MODEL.n_overhead_bytes + sum(
        padded(a.n_bytes, MODEL.alignment) for a in plan.assignments
    )
    assert [a.name for a in plan.assignments] == [t.name for t in MODEL.tensors]
    points = {(t.name, p.format): p for t in MODEL.tensors for p in t.points}
    for a in plan.assignments:
        point = points[a.name, a.format]
        assert (a.n_bytes, a.nmse) == (point.n_bytes, point.nmse)
    assert plan.total_cost == pytest.approx(sum(a.cost for a in plan.assignments))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_cost_falls_as_the_budget_grows(name: str) -> None:
    budgets = [int(SMALLEST * f) for f in (1.0, 1.05, 1.3, 1.7, 2.5, 4, 8)]
    costs = [ramgguf.plan(MODEL, b, objective=name, min_sqnr_db=0).total_cost for b in budgets]
    assert all(b < a for a, b in itertools.pairwise(costs[:-1]))
    assert costs[-1] == 0  # everything fits in the source's own format


def test_every_tensor_keeps_the_floor() -> None:
    plan = ramgguf.plan(MODEL, int(1.8 * SMALLEST), min_sqnr_db=15)
    points = {(t.name, p.format): p for t in MODEL.tensors for p in t.points}
    assert all(points[a.name, a.format].sqnr_db >= 15 for a in plan.assignments)
    assert any("the floor of 15 dB excludes Q2_K" in note for note in plan.notes)


def test_a_budget_too_small_is_told_the_smallest_sizes_and_what_blocks() -> None:
    with pytest.raises(BudgetError) as refused:
        ramgguf.plan(MODEL, 1000, min_sqnr_db=15)
    message = str(refused.value)
    named = [int(n) for n in re.findall(r"\((\d+) bytes\)", message)]
    assert named[0] == 1000
    with_floor, without = named[1:]
    assert without == SMALLEST < with_floor
    assert "token_embd.weight" in message
    assert ramgguf.plan(MODEL, with_floor, min_sqnr_db=15).n_bytes == with_floor
    assert ramgguf.plan(MODEL, without, min_sqnr_db=0).n_bytes == without
    for budget, floor in ((with_floor - 1, 15), (without - 1, 0)):
        with pytest.raises(BudgetError):
            ramgguf.plan(MODEL, budget, min_sqnr_db=floor)


def test_a_budget_is_met_or_the_reason_is_given() -> None:
    """A thousandth is left at most, where no step fits; a model this small has few steps."""
    for percent in range(100, 340, 20):
        plan = ramgguf.plan(MODEL, SMALLEST * percent // 100, min_sqnr_db=0)
        left = plan.budget - plan.n_bytes
        told = [note for note in plan.notes if "of the budget are left" in note]
        assert len(told) == (left > 0.001 * plan.budget)
        for note in told:
            step = re.search(r"(\S+) to (\S+), takes", note)
            if step is None:
                assert "best format that it may have" in note
                continue
            now = next(a for a in plan.assignments if a.name == step[1])
            point = next(
                p
                for t in MODEL.tensors
                if t.name == step[1]
                for p in t.points
                if p.format == step[2]
            )
            assert point.n_bytes - now.n_bytes > left
            assert point.nmse < now.nmse
    everything = ramgguf.plan(MODEL, "200%")
    assert any("best format that it may have" in note for note in everything.notes)


def test_pins_bind_the_tensors_they_match_and_no_others() -> None:
    plan = ramgguf.plan(MODEL, 2 * SMALLEST, pins=[r"blk\.0\.=Q8_0", "attn_v=q6_k"], min_sqnr_db=0)
    formats = {a.name: a.format for a in plan.assignments}
    assert formats["blk.0.attn_v.weight"] == "Q8_0"  # the first pin that matches counts
    assert formats["blk.1.attn_v.weight"] == "Q6_K"
    assert formats["blk.0.attn_norm.weight"] == "F32"
    assert "Q8_0" not in {f for n, f in formats.items() if n.startswith("blk.1.ffn_up")}


@pytest.mark.parametrize(
    ("pins", "formats", "message"),
    [
        (["nowhere=Q4_K"], None, "matches no tensor"),
        (["attn_v"], None, "not of the form"),
        (["(=Q4_K"], None, "not a regular expression"),
        (["attn_v=Q9_K"], None, "Q9_K was not measured"),
        ([], ["Q4_K", "IQ9"], "IQ9 was not measured"),
        (["blk.0.attn_norm.weight=Q4_K"], None, "cannot be pinned to Q4_K: one-dimensional"),
    ],
)
def test_constraints_that_suit_nothing_are_refused(
    pins: list[str], formats: list[str] | None, message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        ramgguf.plan(MODEL, "50%", pins=pins, formats=formats)


def test_only_the_formats_asked_for_are_used() -> None:
    plan = ramgguf.plan(MODEL, 2 * SMALLEST, formats=["Q3_K", "Q6_K"], min_sqnr_db=0)
    used = {a.format for a in plan.assignments if a.source_format == "F16"}
    assert used <= {"Q3_K", "Q6_K", "F16"}


def test_the_published_objective_has_the_published_priors() -> None:
    shape = ModelShape.of(MODEL)
    by_name = {t.name: t for t in MODEL.tensors}
    priors = {
        "token_embd.weight": 10,
        "blk.0.ffn_up.weight": 3,
        "blk.1.ffn_up.weight": 1,
        "blk.3.ffn_up.weight": 2,
    }
    for name, published in priors.items():
        point = by_name[name].points[0]
        assert ram(by_name[name], point, shape) == pytest.approx(published * point.nmse**0.5)


def test_an_unknown_objective_names_the_known_ones() -> None:
    with pytest.raises(PlanError, match="weighted"):
        ramgguf.plan(MODEL, "50%", objective="magic")


def test_what_one_percent_more_would_buy_is_what_it_buys() -> None:
    budget = 2 * SMALLEST
    step = ramgguf.plan(MODEL, budget).next_percent
    assert step is not None
    assert step.n_bytes == budget + budget // 100
    larger = ramgguf.plan(MODEL, step.n_bytes)
    assert larger.total_cost == pytest.approx(step.total_cost, rel=2e-6)
    assert 0 < step.n_changes < len(MODEL.tensors)


def test_a_plan_survives_its_file(tmp_path: pytest.TempPathFactory) -> None:
    plan = ramgguf.plan(MODEL, 2 * SMALLEST)
    assert Plan.from_json(plan.to_json()) == plan
    assert ramgguf.plan(MODEL, 2 * SMALLEST).sha256() == plan.sha256()
    assert ramgguf.plan(MODEL, 3 * SMALLEST).sha256() != plan.sha256()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cut short"),
        (lambda text: text.replace("ramgguf.plan/3", "ramgguf.plan/4"), "ramgguf.plan/4"),
        (lambda text: text.replace('"budget":', '"budgets":'), "budget"),
        (lambda text: re.sub(r'"n_bytes": ?\d+', '"n_bytes":-3', text, count=1), "n_bytes"),
    ],
)
def test_a_plan_file_that_was_damaged_is_refused_by_name(
    change: Callable[[str], str], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(change(ramgguf.plan(MODEL, 2 * SMALLEST).to_json()), name="plan.json")


def test_exported_tensor_types_match_one_tensor_each() -> None:
    plan = ramgguf.plan(MODEL, 2 * SMALLEST)
    lines = tensor_types(plan).splitlines()
    quantizable = [a for a in plan.assignments if a.source_format == "F16"]
    assert len(lines) == len(quantizable)
    for line, assignment in zip(lines, quantizable, strict=True):
        pattern, _, name = line.rpartition("=")
        assert name == assignment.format.lower()
        matching = [a.name for a in plan.assignments if re.search(pattern, a.name)]
        assert matching == [assignment.name]


def test_formats_fall_in_bytes_with_their_bits() -> None:
    assert sorted(BPW.values()) == list(BPW.values())
