"""A projector planned with its model: no division of the bytes between the two costs less."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import made_documents
import ramgguf
import synthetic
from made_speeds import made_speeds
from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.gguf.layout import padded
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan import SpeedLimit, TokenWork
from ramgguf.plan.input_rounding import added_nmse
from ramgguf.plan.objectives import costing
from ramgguf.plan.priors import ModelShape, prior
from ramgguf.plan.result import Plan
from ramgguf.plan.together import projector_cost
from ramgguf.sensitivity.result import Sensitivity, TensorSensitivity

D = 96


def _measured(architecture: str, tensors: list[TensorMeasurement], overhead: int) -> Measurement:
    name = "model" if architecture == "llama" else "mmproj"
    source = synthetic.SOURCE.model_copy(
        update={"architecture": architecture, "path": f"{name}-f16.gguf"}
    )
    return Measurement(
        ramgguf_version="0", source=source, encoder="rtn", formats=tuple(synthetic.BPW),
        n_overhead_bytes=overhead, alignment=32, n_layers=1, tensors=tuple(tensors),
    )  # fmt: skip


def _model(seed: int) -> Measurement:
    rng = np.random.default_rng(seed)
    return _measured(
        "llama",
        [
            synthetic.tensor("token_embd.weight", (D, 4 * D), "tied_embedding", None, rng),
            synthetic.norm("blk.0.attn_norm.weight", D, 0),
            synthetic.tensor("blk.0.attn_v.weight", (D, D), "attn_v", 0, rng),
            synthetic.tensor("blk.0.ffn_down.weight", (2 * D, D), "ffn_down", 0, rng),
        ],
        4096,
    )


def _projector(seed: int) -> Measurement:
    rng = np.random.default_rng(seed + 1000)
    return _measured(
        "clip",
        [
            synthetic.tensor("v.blk.0.attn_v.weight", (D, D), "attn_v", 0, rng),
            synthetic.tensor("v.blk.0.ffn_up.weight", (D, 3 * D), "ffn_up", 0, rng),
            synthetic.norm("v.post_ln.weight", D, None),
            synthetic.tensor("mm.0.weight", (D, D), "projector", None, rng),
        ],
        2048,
    )


def _bytes_of(plan: Plan) -> int:
    assert plan.mmproj is not None
    return plan.n_bytes + plan.mmproj.n_bytes


def _cost_of(plan: Plan) -> float:
    assert plan.mmproj is not None
    return plan.total_cost + plan.mmproj.total_cost


Choices = list[tuple[int, float, float]]  # bytes, cost, seconds


def _choices(measurement: Measurement, seconds: dict[str, float]) -> list[Choices]:
    shape = ModelShape.of(measurement)
    return [
        [
            (
                padded(p.n_bytes, 32),
                0.0 if t.kept else t.n_weights * prior(t, shape) * (p.nmse + added_nmse(t, p)),
                t.n_weights * seconds.get(p.format, 0.0),
            )
            for p in t.points
        ]
        for t in measurement.tensors
    ]


def _exhaustive(items: list[Choices], capacity: int, most_seconds: float = math.inf) -> float:
    return min(
        sum(cost for _, cost, _ in taken)
        for taken in itertools.product(*items)
        if sum(n for n, _, _ in taken) <= capacity and sum(s for _, _, s in taken) <= most_seconds
    )


FORMATS = ("Q2_K", "Q4_K", "Q6_K")


def _few(measurement: Measurement) -> Measurement:
    """Return it with few formats, so that all plans of both can be tried."""
    tensors = tuple(
        t.model_copy(
            update={"points": tuple(p for p in t.points if p.format in (*FORMATS, t.source_format))}
        )
        for t in measurement.tensors
    )
    return measurement.model_copy(update={"tensors": tensors, "formats": FORMATS})


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 50), fraction=st.floats(0, 1))
def test_no_plan_of_both_within_the_bytes_costs_less(seed: int, fraction: float) -> None:
    model, projector = _few(_model(seed)), _few(_projector(seed))
    items = [*_choices(model, {}), *_choices(projector, {})]
    low, high = (sum(f(n for n, _, _ in item) for item in items) for f in (min, max))
    capacity, overhead = low + int(fraction * (high - low)), 4096 + 2048
    made = ramgguf.plan(model, capacity + overhead, min_sqnr_db=0, projector=projector)
    assert _bytes_of(made) <= capacity + overhead
    assert _cost_of(made) == pytest.approx(_exhaustive(items, capacity), rel=1e-9, abs=1e-9)
    assert made.mmproj is not None
    for measured, plan in ((model, made), (projector, made.mmproj)):
        assert [a.name for a in plan.assignments] == [t.name for t in measured.tensors]
        points = {(t.name, p.format): p.n_bytes for t in measured.tensors for p in t.points}
        assert all(points[a.name, a.format] == a.n_bytes for a in plan.assignments)
        assert plan.budget == plan.n_bytes
        assert plan.source == measured.source


def test_a_byte_buys_as_much_in_the_projector_as_in_the_model() -> None:
    """Two plans of the same bytes, each the best of its file alone, never cost less together."""
    model, projector = _model(3), _projector(3)
    smallest = [
        ramgguf.plan(m, "1000%", formats=["Q2_K"], pins=["weight=Q2_K"], min_sqnr_db=0).n_bytes
        for m in (model, projector)
    ]
    budget = int(1.7 * sum(smallest))
    together = ramgguf.plan(model, budget, min_sqnr_db=0, projector=projector)
    apart = []
    for share in np.linspace(0.3, 0.7, 41):
        ours = int(share * budget)
        if ours < smallest[0] or budget - ours < smallest[1]:
            continue
        one = ramgguf.plan(model, ours, min_sqnr_db=0)
        other = ramgguf.plan(projector, budget - ours, min_sqnr_db=0)
        apart.append(one.total_cost + other.total_cost)
    assert len(apart) > 10
    assert _cost_of(together) <= min(apart) * (1 + 1e-12)
    assert _cost_of(together) < 0.8 * max(apart)


def test_the_projector_takes_bytes_and_no_time_under_a_least_speed() -> None:
    model, projector = _few(_model(5)), _few(_projector(5))
    profile = made_speeds({"Q2_K": 5.0})
    seconds = {f: profile.rates[f].generation for f in (*FORMATS, "F16", "F32")}
    seconds["F32"] = 0.0  # norms
    work = {"blk.0.attn_norm.weight": 0.0}
    most = seconds["Q4_K"] * 1.2 * sum(t.n_weights for t in model.tensors if t.kept is None)
    timed = SpeedLimit(profile, TokenWork(0, work, work), 1 / most)
    items = [*_choices(model, seconds), *[
        [(n, cost, 0.0) for n, cost, _ in item] for item in _choices(projector, {})
    ]]  # fmt: skip
    capacity = int(0.5 * sum(max(n for n, _, _ in item) for item in items))
    made = ramgguf.plan(model, capacity + 6144, min_sqnr_db=0, projector=projector, speed=timed)
    best, free = _exhaustive(items, capacity, most), _exhaustive(items, capacity)
    assert free < best
    assert made.mmproj is not None
    # Added up in the order of the items: to the last bit.
    assert best <= sum(a.cost for p in (made, made.mmproj) for a in p.assignments)
    assert _cost_of(made) <= best / (1 - made.gap) * (1 + 1e-9)
    assert made.speed is not None
    assert made.speed.generation >= 1 / most


def test_sensitivities_of_the_model_set_the_scale_of_the_projectors_costs() -> None:
    """With α = c · n · π everywhere, plans by α are those by priors, whatever c is."""
    model, projector = _model(7), _projector(7)
    shape, c = ModelShape.of(model), 3e-7
    sensed = Sensitivity(
        ramgguf_version="0", source=model.source, encoder="rtn", engine="b1",
        tokens=made_documents.sensitivity().tokens,
        tensors=tuple(
            TensorSensitivity(
                name=t.name, role=t.role, layer=t.layer, n_weights=t.n_weights,
                alpha=c * t.n_weights * prior(t, shape), relative_error=0.1, origin="role",
                reading=None,
            )
            for t in model.tensors if t.kept is None
        ),
    )  # fmt: skip
    by_alpha = costing("sensitivity", model, sensed)
    point = Point(format="Q4_K", n_bytes=1, nmse=0.01, max_error=0.0)
    others = ModelShape.of(projector)
    for tensor in projector.tensors:
        cost = projector_cost(by_alpha, model, projector)(tensor, point)
        loss = 0.01 + added_nmse(tensor, point)
        assert cost == pytest.approx(c * tensor.n_weights * prior(tensor, others) * loss)
    budget = 120_000
    plans = [
        ramgguf.plan(model, budget, min_sqnr_db=0, projector=projector, **options)
        for options in ({"sensitivity": sensed}, {"objective": "weighted"})
    ]
    formats = [
        [a.format for p in (plan, plan.mmproj) if p for a in p.assignments] for plan in plans
    ]
    assert formats[0] == formats[1]


def test_pins_and_minimums_that_suit_the_model_are_its_own_and_others_the_projectors() -> None:
    model, projector = _model(1), _projector(1)
    made = ramgguf.plan(
        model, 200_000, min_sqnr_db=0, projector=projector,
        pins=["attn_v=Q2_K", r"^v\..*ffn_up=Q3_K"],
        min_formats=["ffn_down=Q6_K", "projector=Q8_0"],
    )  # fmt: skip
    assert made.mmproj is not None
    own = {a.name: a.format for a in made.assignments}
    others = {a.name: a.format for a in made.mmproj.assignments}
    assert own["blk.0.attn_v.weight"] == "Q2_K" != others["v.blk.0.attn_v.weight"]
    assert others["v.blk.0.ffn_up.weight"] == "Q3_K"
    assert own["blk.0.ffn_down.weight"] in ("Q6_K", "Q8_0", "F16")
    assert others["mm.0.weight"] in ("Q8_0", "F16")
    with pytest.raises(PlanError, match="pin 'nothing' matches no tensor"):
        ramgguf.plan(model, 200_000, projector=projector, pins=["nothing=Q4_K"])
    with pytest.raises(PlanError, match="no role 'nothing'"):
        ramgguf.plan(model, 200_000, projector=projector, min_formats=["nothing=Q4_K"])


def test_what_both_need_at_least_is_said_where_it_does_not_fit() -> None:
    model, projector = _model(2), _projector(2)
    with pytest.raises(BudgetError) as refused:
        ramgguf.plan(model, 20_000, min_sqnr_db=0, projector=projector)
    smallest = refused.value.smallest
    assert smallest is not None
    made = ramgguf.plan(model, smallest, min_sqnr_db=0, projector=projector)
    assert _bytes_of(made) == smallest
    with pytest.raises(BudgetError):
        ramgguf.plan(model, smallest - 1, min_sqnr_db=0, projector=projector)


def test_what_is_no_projector_is_refused_and_so_is_an_objective_of_outputs() -> None:
    model = _model(2)
    with pytest.raises(PlanError, match="expected a vision projector"):
        ramgguf.plan(model, 200_000, projector=model)
    by_output = costing("nmse", model)
    by_output = type(by_output)("output", by_output.cost)
    with pytest.raises(PlanError, match="a text's activations"):
        projector_cost(by_output, model, _projector(2))


def test_a_plan_of_both_is_read_from_its_file_as_it_was(tmp_path: Path) -> None:
    made = ramgguf.plan(_model(4), 150_000, min_sqnr_db=0, projector=_projector(4))
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
