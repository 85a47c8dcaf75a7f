"""The front of size, cost and speed: nothing on it is beaten, and its ends are the extremes."""

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ramgguf
from made_speeds import made_speeds
from ramgguf.cli import plan_commands
from ramgguf.cli.app import app
from ramgguf.plan import Costing, SpeedFront, SpeedLimit, TokenWork, speed_front
from ramgguf.plan.input_rounding import added_nmse, rounding_nmse
from ramgguf.plan.prediction import SHIPPED
from ramgguf.plan.result import Constraints
from ramgguf.plan.speed_front import speed_front as front_of
from ramgguf.quantize.speed_target import speed_limit
from ramgguf.report.speed_front import print_speed_front
from ramgguf.report.terminal import PlainConsole
from synthetic import measurement
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

PROFILE = made_speeds({"Q4_K": 1.5, "Q8_0": 0.9}, prompt_seconds={"Q3_K": 3e-9, "Q8_0": 2e-9})
LIMIT = SpeedLimit(PROFILE, TokenWork(4, {}, {}))


@pytest.fixture(scope="module")
def front() -> SpeedFront:
    return speed_front(measurement(), LIMIT)


def test_no_plan_of_the_front_beats_another(front: SpeedFront) -> None:
    places = [(p.n_bytes, p.cost, -p.generation, -p.prompt) for p in front.plans]
    assert len(set(places)) == len(places) > 20
    for a in places:
        for b in places:
            assert a == b or any(x < y for x, y in zip(a, b, strict=True))
    assert all(a.n_bytes <= b.n_bytes for a, b in pairwise(front.plans))


def test_plans_by_bytes_alone_are_on_it_or_near(front: SpeedFront) -> None:
    frontier = ramgguf.curve(measurement())
    assert front.plans[0].n_bytes == frontier.start_bytes
    assert min(p.cost for p in front.plans) == 0.0
    for p in front.plans:  # none is better than the optimum of its bytes
        best = ramgguf.plan(measurement(), p.n_bytes)
        assert best.total_cost * (1 - best.gap) <= p.cost * (1 + 1e-9)


def test_a_plan_of_the_front_can_be_made_by_its_figures(front: SpeedFront) -> None:
    shown = front.spread(9)
    assert len(shown) == 9
    for p in shown:
        limit = SpeedLimit(PROFILE, LIMIT.work, 0.999 * p.generation, 0.999 * p.prompt)
        made = ramgguf.plan(measurement(), p.n_bytes, speed=limit)
        assert made.total_cost * (1 - made.gap) <= p.cost * (1 + 1e-9)


def test_sensitivities_give_each_plan_the_kld_that_they_predict() -> None:
    made = measurement()
    alpha = {t.name: 1e-7 * t.n_weights for t in made.tensors}
    late = dict.fromkeys(alpha, 0.9)
    by_alpha = Costing(
        "sensitivity", lambda t, p: alpha[t.name] * (p.nmse + added_nmse(t, p)), alpha, {}, late
    )
    constraints = Constraints(min_sqnr_db=0)
    found = front_of(made, LIMIT, costing=by_alpha, constraints=constraints)
    known = [p for p in found.plans if p.kld is not None]
    assert len(known) >= len(found.plans) - 1  # one plan loses nothing
    for p in known[:: len(known) // 6]:
        assert p.kld is not None
        # Σ 0.9 α · NMSE, and what kernels round, in proportion to Σ α of what is quantized; costs
        # have more of that, or less.
        rounding = SHIPPED.kernel_nmse * sum(alpha.values())
        most = rounding_nmse("head", "Q4_K") * sum(alpha.values())
        assert 0.9 * (p.cost - most) < p.kld.kld <= 0.9 * (p.cost + rounding) * (1 + 1e-9)
        assert p.kld.low < p.kld.kld < p.kld.high
    console = PlainConsole(record=True, file=io.StringIO(), width=200)
    print_speed_front(found, console)
    text = console.export_text()
    assert "KLD, nats" in text
    assert "KLD is predicted, with its 95 % interval" in " ".join(text.split())
    assert SpeedFront.from_json(found.to_json()) == found


def test_priors_predict_no_kld(front: SpeedFront) -> None:
    assert all(p.kld is None for p in front.plans)
    console = PlainConsole(record=True, file=io.StringIO(), width=200)
    print_speed_front(front, console)
    assert "KLD" not in console.export_text()


def test_both_commands_show_the_same_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_up(*options: Any, **more: Any) -> SpeedLimit:
        more["profile"] = PROFILE
        return speed_limit(*options, **more)

    monkeypatch.setattr(plan_commands, "speed_limit", made_up)
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    measured = tmp_path / "m.rd.json"
    ramgguf.measure(model, threads=1).save(measured)
    saved = tmp_path / "front.json"
    run = CliRunner().invoke
    shown = run(app, ["frontier", str(measured), "--speed", "-o", str(saved), "--json"])
    assert shown.exit_code == 0, shown.output
    front = SpeedFront.load(saved)
    assert [p.n_bytes for p in front.plans] == [
        p["n_bytes"] for p in json.loads(shown.stdout)["plans"]
    ]
    other = run(app, ["quantize", str(model), "--target", "speed", "--json", "-t", "1"])
    assert other.exit_code == 0, other.output
    assert json.loads(other.stdout)["plans"] == json.loads(shown.stdout)["plans"]
    another = write_tiny_model(tmp_path / "n.gguf", weight_type="F16", seed=5)
    wrong = run(app, ["frontier", str(measured), "--speed", "--model", str(another)])
    assert wrong.exit_code == 1
    table = run(app, ["frontier", str(measured), "--speed"])
    assert "none is smaller, better and faster" in " ".join(table.output.split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("frontier m.rd.json --speed -b 5bpw", "--budget would have no effect"),
        ("frontier m.rd.json --threads 1", "--threads"),
        ("frontier f.json --speed", "--speed"),
        ("quantize m.gguf --target speed -b 5bpw", "--budget"),
        ("quantize m.gguf --target quality", "is not speed"),
        ("quantize m.gguf --target speed --sensitivity measure", "name a file"),
    ],
)
def test_options_without_effect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    measured = ramgguf.measure(write_tiny_model(tmp_path / "m.gguf"), threads=1)
    measured.save(tmp_path / "m.rd.json")
    ramgguf.curve(measured, min_sqnr_db=0).save(tmp_path / "f.json")
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", "").split())
