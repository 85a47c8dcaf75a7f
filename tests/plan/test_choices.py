"""Ties, minimum formats, explanations, recipes and differences of plans."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli import plan_commands
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.measure.result import Point, TensorMeasurement
from ramgguf.plan.recipes import Recipe, pins_for
from ramgguf.plan.result import Plan
from ramgguf.quants import formats
from ramgguf.quants.formats import SETS, expand
from ramgguf.quants.imatrix import ImportanceSource
from ramgguf.report.choices import print_explanation
from ramgguf.report.plans import print_plan
from ramgguf.report.tensor_types import recipe_types
from synthetic import measurement

MODEL = measurement()
BUDGET = ramgguf.curve(MODEL).start_bytes * 3 // 2


def _formats(plan: Plan, pattern: str) -> dict[str, str]:
    return {a.name: a.format for a in plan.assignments if re.search(pattern, a.name)}


def test_tied_tensors_of_a_layer_take_one_format() -> None:
    free = ramgguf.plan(MODEL, BUDGET)
    tied = ramgguf.plan(MODEL, BUDGET, ties=["qkv", "gate-up"])
    for layer in range(4):
        for pattern in (rf"blk\.{layer}\.attn_[qkv]\.", rf"blk\.{layer}\.ffn_(gate|up)\."):
            assert len(set(_formats(tied, pattern).values())) == 1
    assert len(set(_formats(free, r"blk\.\d\.attn_[qkv]\.").values())) > 1
    assert tied.n_bytes <= BUDGET
    assert tied.total_cost > free.total_cost  # a constraint never helps
    assert tied.total_cost == pytest.approx(sum(a.cost for a in tied.assignments))


@pytest.mark.parametrize("share", [1.1, 1.5, 2.2, 3.0])
def test_a_plan_for_vllm_is_the_best_of_those_with_one_format_for_what_it_fuses(
    share: float,
) -> None:
    budget = int(ramgguf.curve(MODEL).start_bytes * share)
    made = ramgguf.plan(MODEL, budget, target="vllm")
    by_hand = ramgguf.plan(MODEL, budget, ties=["qkv", "gate-up"])
    assert made.assignments == by_hand.assignments
    assert made.gap == 0
    assert "for vllm, which fuses them, these of a layer take one format: " in "\n".join(made.notes)
    for layer in range(4):
        for pattern in (rf"blk\.{layer}\.attn_[qkv]\.", rf"blk\.{layer}\.ffn_(gate|up)\."):
            assert len(set(_formats(made, pattern).values())) == 1
    steps = ramgguf.curve(MODEL, target="vllm")
    assert any("for vllm" in note for note in ramgguf.plan(steps, budget).notes)
    assert Plan.from_json(made.to_json()) == made


def _with_mxfp4(tensor: TensorMeasurement) -> TensorMeasurement:
    """Return the tensor with a point in MXFP4 that is better than any other of its size."""
    if tensor.kept is not None:
        return tensor
    n_bytes = tensor.n_weights * 17 // 32
    points = sorted((*tensor.points, Point("MXFP4", n_bytes, 1e-6, 0.1)), key=lambda p: p.n_bytes)
    return tensor.model_copy(update={"points": tuple(points)})


def test_a_plan_for_vllm_has_formats_that_vllm_runs() -> None:
    tensors = tuple(_with_mxfp4(t) for t in MODEL.tensors)
    made = MODEL.model_copy(update={"tensors": tensors, "formats": (*MODEL.formats, "MXFP4")})
    free = ramgguf.plan(made, BUDGET)
    assert "MXFP4" in {a.format for a in free.assignments}
    bound = ramgguf.plan(made, BUDGET, target="vllm")
    assert "MXFP4" not in {a.format for a in bound.assignments}
    assert "for vllm, which does not run them, left out: MXFP4" in bound.notes
    # On the grid of a format that it does not run, weights may take a larger one.
    first = next(t for t in made.tensors if t.kept is None)
    on_grid = first.model_copy(update={"grid": "MXFP4"})
    gridded = made.model_copy(
        update={"tensors": tuple(on_grid if t is first else t for t in made.tensors)}
    )
    for target, largest in ((None, "MXFP4"), ("vllm", "F16")):
        planned = ramgguf.plan(gridded, "1000%", target=target)
        assert next(a.format for a in planned.assignments if a.name == first.name) == largest


def test_what_vllm_does_not_run_and_nothing_replaces_is_said() -> None:
    first = next(t for t in MODEL.tensors if t.kept is None)
    copied = first.model_copy(
        update={
            "source_format": "MXFP4", "kept": "already quantized to MXFP4",
            "points": (Point("MXFP4", first.n_weights * 17 // 32, 0.0, 0.0),),
        }
    )  # fmt: skip
    made = MODEL.model_copy(
        update={"tensors": tuple(copied if t is first else t for t in MODEL.tensors)}
    )
    said = "vllm does not run the file: no format that it runs for 1 tensor, "
    notes = ramgguf.plan(made, "1000%", target="vllm").notes
    assert [n for n in notes if n.startswith(said) and f"{first.name} in MXFP4 first" in n]
    pinned = ramgguf.plan(
        MODEL.model_copy(update={"tensors": tuple(_with_mxfp4(t) for t in MODEL.tensors),
                                 "formats": (*MODEL.formats, "MXFP4")}),
        "1000%", target="vllm", pins=["token_embd=MXFP4"],
    )  # fmt: skip
    assert any(n.startswith(said) for n in pinned.notes)
    assert not any("does not run" in n for n in ramgguf.plan(made, "1000%").notes)


def test_targets_that_tie_nothing_say_so_or_are_refused(tmp_path: Path) -> None:
    norms_only = MODEL.model_copy(
        update={"tensors": tuple(t for t in MODEL.tensors if t.role not in ("attn_q", "attn_k"))}
    )
    assert ramgguf.plan(norms_only, "50%", target="vllm").constraints.ties == (
        ("ffn_gate", "ffn_up"),
    )
    heads = tuple(t for t in MODEL.tensors if t.layer is None)
    alone = ramgguf.plan(MODEL.model_copy(update={"tensors": heads}), "90%", target="vllm")
    assert "--for vllm ties nothing: no layer has two tensors that it fuses" in alone.notes
    with pytest.raises(PlanError, match="'x' is none of vllm, ollama"):
        ramgguf.plan(MODEL, BUDGET, target="x")
    MODEL.save(tmp_path / "m.rd.json")
    for name, said in (("x", "none of vllm, ollama"), ("ollama", "quantize serves it")):
        command = ["plan", str(tmp_path / "m.rd.json"), "-b", "50%", "--for", name]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert said in " ".join(done.output.replace("│", " ").split())


def test_roles_can_be_tied_by_a_list() -> None:
    tied = ramgguf.plan(MODEL, BUDGET, ties=["attn_output,ffn_down"])
    for layer in range(4):
        assert len(set(_formats(tied, rf"blk\.{layer}\.(attn_output|ffn_down)").values())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": ["attn_q"]}, "fewer than two roles"),
        ({"ties": ["attn_q,attn_qkv"]}, "suits fewer than two of the roles"),
        ({"ties": ["qkv"], "pins": [r"0\.attn_q=Q4_K", r"0\.attn_k=Q5_K"]}, "untie them"),
        ({"min_formats": ["attn_v"]}, "not of the form 'role=FORMAT'"),
        ({"min_formats": ["attn_w=Q4_K"]}, "there is no role 'attn_w'"),
    ],
)
def test_constraints_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        ramgguf.plan(MODEL, BUDGET, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pins": ["norm=Q4_K"]}, "matches only what is never quantized: blk.0.attn_norm.weight"),
        ({"min_formats": ["norm=Q4_K"]}, "there is no role 'norm' among the tensors that are quan"),
        ({"ties": ["attn_q,norm"]}, "suits fewer than two of the roles attn_k"),
        ({"ties": ["attn_q,attn_k,attn_w"]}, "names attn_w, which no tensor that is quantized is"),
        ({"ties": ["tied_embedding,attn_q"]}, "tie tied_embedding,attn_q has no effect: no layer"),
        ({"ties": ["qkv", "attn_q,attn_v"]}, "tie attn_q,attn_v has no effect: no layer has two"),
    ],
)
def test_options_that_bind_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        ramgguf.plan(MODEL, "50%", **options)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"pins": ["attn_q=Q4_K", "blk.0.attn_q=Q8_0"]}, "pin blk.0.attn_q=Q8_0 has no effect"),
        ({"pins": ["norm=F32"]}, "pin norm=F32 has no effect"),
        ({"pins": ["attn_v=Q6_K"], "min_formats": ["attn_v=Q4_K"]}, "attn_v=Q4_K has no effect"),
    ],
)
def test_options_that_others_make_idle_are_noted(options: dict[str, Any], note: str) -> None:
    found = ramgguf.plan(MODEL, "50%", **options)
    assert sum(note in n for n in found.notes) == 1
    plain = ramgguf.plan(MODEL, "50%", pins=["attn_q=Q4_K"], min_formats=["attn_v=Q4_K"])
    assert not any("no effect" in n for n in plain.notes)


def test_a_format_that_suits_no_tensor_is_noted() -> None:
    without = tuple(
        t.model_copy(update={"points": tuple(p for p in t.points if p.format != "Q5_K")})
        for t in MODEL.tensors
    )
    model = MODEL.model_copy(update={"tensors": without})
    found = ramgguf.plan(model, "50%", formats=["Q4_K", "Q5_K", "Q8_0"])
    assert any("Q5_K suits no tensor" in note for note in found.notes)
    assert not any(
        "suits no tensor" in n for n in ramgguf.plan(MODEL, "50%", formats=["Q5_K"]).notes
    )


def test_a_role_keeps_its_minimum_format() -> None:
    plan = ramgguf.plan(MODEL, BUDGET, min_formats=["ffn_gate=Q5_K"])
    assert set(_formats(plan, "ffn_gate").values()) <= {"Q5_K", "Q6_K", "Q8_0", "F16"}
    assert set(_formats(plan, "ffn_up").values()) & {"Q2_K", "Q3_K", "Q4_K", "Q4_0"}
    assert plan.n_bytes <= BUDGET


def test_a_measurement_with_other_error_weights_explains_nothing() -> None:
    weights = ImportanceSource(path="i.gguf", sha256="1" * 64, n_entries=1)
    plan = ramgguf.plan(MODEL, BUDGET)
    for update in ({}, {"scales_path": "s.gguf", "scales_sha256": "2" * 64}):
        weighed = weights.model_copy(update=update)
        with pytest.raises(PlanError, match="importance matrix, Hessians or scales are others"):
            ramgguf.explain(plan.model_copy(update={"imatrix": weighed}), MODEL)


def test_an_explanation_s_steps_are_what_the_measurement_says() -> None:
    plan = ramgguf.plan(MODEL, BUDGET)
    explained = ramgguf.explain(plan, MODEL)
    assert explained.price > 0
    for e, tensor in zip(explained.tensors, MODEL.tensors, strict=True):
        points = {p.format: p for p in tensor.points}
        for step in (e.up, e.down):
            if step is not None:
                assert abs(step.n_bytes - points[step.format].n_bytes + e.assignment.n_bytes) < 32
        if e.assignment.note is None and e.up is not None and e.down is not None:
            # An optimal plan: no step up pays more than a step down would cost, beyond rounding.
            assert e.up.rate < e.down.rate


def test_steps_up_pay_less_than_the_price_and_steps_down_cost_more() -> None:
    frontier = ramgguf.curve(MODEL)
    plan = ramgguf.plan(frontier, frontier.steps[len(frontier.steps) // 2].n_bytes)
    explained = ramgguf.explain(plan, MODEL)
    for e in explained.tensors:
        if e.up is not None:
            assert e.up.rate <= explained.price * (1 + 1e-6)
        if e.down is not None:
            assert e.down.rate >= explained.price * (1 - 1e-6)


def test_an_explanation_names_floor_pin_and_tie() -> None:
    plan = ramgguf.plan(MODEL, BUDGET, pins=["blk.0.attn_v=Q6_K"], ties=["gate-up"])
    explained = {e.assignment.name: e for e in ramgguf.explain(plan, MODEL).tensors}
    whole = ramgguf.explain(plan, MODEL)
    assert whole.reason(explained["blk.0.attn_v.weight"]) == "no choice: pinned to Q6_K"
    assert explained["blk.1.ffn_up.weight"].tied == ("blk.1.ffn_gate.weight",)
    strict = ramgguf.plan(MODEL, 2 * BUDGET, min_sqnr_db=15)
    barred = ramgguf.explain(strict, MODEL).tensors[0].barred
    assert any(b.format == "Q2_K" and "below the floor of 15 dB" in b.reason for b in barred)


def test_a_tensor_is_explained_by_name_and_one_that_is_not_there_is_named() -> None:
    explained = ramgguf.explain(ramgguf.plan(MODEL, BUDGET), MODEL)
    assert explained.of("blk.1.ffn_up.weight").assignment.name == "blk.1.ffn_up.weight"
    for say in (explained.of, lambda name: print_explanation(explained, name, Console())):
        with pytest.raises(PlanError, match=r"the plan has no tensor 'blk[.]9[.]ffn_up[.]weight'"):
            say("blk.9.ffn_up.weight")


def test_a_plan_of_another_model_is_not_explained() -> None:
    plan = ramgguf.plan(MODEL, BUDGET)
    other = MODEL.model_copy(
        update={"source": MODEL.source.model_copy(update={"header_sha256": "1" * 64})}
    )
    with pytest.raises(PlanError, match="another model"):
        ramgguf.explain(plan, other)
    with pytest.raises(PlanError, match="search encoder"):
        ramgguf.explain(plan, MODEL.model_copy(update={"encoder": "search"}))


def test_a_recipe_gives_another_measurement_the_same_formats(tmp_path: Path) -> None:
    plan, other = ramgguf.plan(MODEL, BUDGET), measurement(seed=7)
    path = tmp_path / "plan.json"
    plan.save(path)
    followed = ramgguf.follow(other, path)
    assert [a.format for a in followed.assignments] == [a.format for a in plan.assignments]
    assert followed.n_bytes == followed.budget == plan.n_bytes
    assert not any("of the budget are left" in note for note in followed.notes)
    recipe = Recipe.read(path)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.read(tmp_path / "recipe.json") == recipe


def test_a_recipe_of_other_shapes_is_refused_by_the_tensor() -> None:
    recipe = Recipe.of_plan(ramgguf.plan(MODEL, BUDGET), "plan.json")
    with pytest.raises(PlanError, match=r"token_embd\.weight.*same shapes"):
        pins_for(recipe, measurement(d=512))
    with pytest.raises(PlanError, match=r"no tensor blk\.4\."):
        pins_for(recipe, measurement(n_layers=5))


def test_a_difference_lists_what_changed_and_balances_its_bytes(tmp_path: Path) -> None:
    a, b = ramgguf.plan(MODEL, BUDGET), ramgguf.plan(MODEL, 2 * BUDGET)
    for name, plan in (("a", a), ("b", b)):
        plan.save(tmp_path / name)
    found = ramgguf.diff(tmp_path / "a", tmp_path / "b")
    changed = {
        x.name for x, y in zip(a.assignments, b.assignments, strict=True) if x.format != y.format
    }
    assert {c.name for c in found.changes} == changed
    assert found.n_same + len(found.changes) == len(a.assignments)
    weights = [sum(x.n_bytes for x in p.assignments) for p in (a, b)]
    assert sum(c.n_bytes for c in found.changes) == weights[1] - weights[0]


def test_files_that_are_neither_plan_nor_gguf_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text('{"schema": "ramgguf.measurement/1"}')
    with pytest.raises(PlanError, match="measurement"):
        Recipe.read(path)
    with pytest.raises(GGUFError, match="cannot be opened: No such file"):
        Recipe.read(tmp_path / "nowhere")


def test_a_recipe_s_tensor_types_name_one_tensor_each() -> None:
    plan = ramgguf.plan(MODEL, BUDGET)
    lines = recipe_types(Recipe.of_plan(plan, "p")).splitlines()
    for line in lines:
        pattern, _, name = line.rpartition("=")
        matching = [a for a in plan.assignments if re.search(pattern, a.name)]
        assert [a.format.lower() for a in matching] == [name]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choices")
    MODEL.save(folder / "m.json")
    for name, share in (("a", 1), ("b", 2)):
        ramgguf.plan(MODEL, share * BUDGET).save(folder / f"{name}.json")
    return folder


COMMANDS = typer.Typer()
plan_commands.register(COMMANDS)


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(COMMANDS, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_print_what_the_functions_return(files: Path) -> None:
    frontier = json.loads(_run("curve", files / "m.json", "--json"))
    assert frontier["start_bytes"] == ramgguf.curve(MODEL).start_bytes
    explained = json.loads(_run("explain", files / "a.json", "-m", files / "m.json", "--json"))
    assert len(explained["tensors"]) == len(MODEL.tensors)
    found = json.loads(_run("diff", files / "a.json", files / "b.json", "--json"))
    assert len(found["changes"]) == len(ramgguf.diff(files / "a.json", files / "b.json").changes)
    assert "ffn_down" in _run("recipe", files / "a.json")
    assert "× the price" in _run(
        "explain", files / "a.json", "blk.1.attn_v.weight", "-m", files / "m.json"
    )
    assert " changed, " in _run("diff", files / "a.json", files / "b.json", "-v")


def test_a_saved_frontier_answers_budgets_and_draws(files: Path) -> None:
    saved, picture = files / "f.json", files / "f.svg"
    _run("curve", files / "m.json", "-o", saved)
    text = _run("curve", saved, "-b", str(BUDGET), "--svg", picture)
    assert "asked for" in text
    assert picture.read_text().startswith("<svg")


def test_planning_prints_nothing_not_even_from_native_code(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for percent in (30, 40, 50):
        ramgguf.plan(MODEL, f"{percent}%", objective="nmse", min_sqnr_db=0)
    assert capfd.readouterr() == ("", "")


def test_a_plan_by_priors_says_so_and_what_measures() -> None:
    plan = ramgguf.plan(MODEL, BUDGET)
    console = Console(record=True, width=300, file=io.StringIO())
    print_plan(plan, console)
    assert "`--sensitivity measure`" in console.export_text()
    console = Console(record=True, width=300, file=io.StringIO())
    print_plan(ramgguf.plan(MODEL, BUDGET, objective="nmse"), console)
    assert "--sensitivity" not in console.export_text()


def test_a_set_stands_for_its_formats() -> None:
    assert expand(["k", "Q8_0", "q4_k"]) == ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
    for members in SETS.values():
        assert set(members) <= set(formats.quantized())
    measured = {p.format for t in MODEL.tensors for p in t.points}
    assert set(SETS["k"]) <= measured
    plan = ramgguf.plan(MODEL, BUDGET, formats=["k"])
    assert plan.constraints.formats == SETS["k"]
    assert {a.format for a in plan.assignments} <= {*SETS["k"], "F16", "F32"}


def test_the_fast_formats_are_those_that_were_measured_to_be() -> None:
    results = Path(__file__).parents[2] / "bench/results/format_speed.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    speeds = {r["format"]: (r["prompt_tokens_per_s"], r["generated_tokens_per_s"]) for r in rows}
    names = [name for name in speeds if name != "F16"]
    fastest = max(speeds[name][0] for name in names)
    fast = set()
    for name in names:
        bits = formats.get(name).bpw
        rivals = [speeds[n][1] for n in names if formats.get(n).bpw >= bits]
        if speeds[name][0] >= 0.75 * fastest and speeds[name][1] >= 0.85 * max(rivals):
            fast.add(name)
    assert fast == set(SETS["cpu-fast"])
