"""One command from a model to a file that is proven to run here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ramgguf
from bigram_model import write_bigram_model
from made_speeds import made_speeds
from ramgguf import Quantized
from ramgguf.cli import pick_commands
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import Available
from ramgguf.deploy import picking
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.picking import PickRequest, pick
from ramgguf.deploy.result import CheckResult, Spread
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.trial_protocol import Rates
from ramgguf.quantize import speed_target

pytest.importorskip("llama_cpp")

LIMIT = Available(500_000_000, "a test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bigram_model(tmp_path_factory.mktemp("pick") / "bigram-f32.gguf")


def _request(min_speed: float = 0.0, n_seq: int = 0) -> PickRequest:
    trial = CheckRequest(ContextShape(128), LIMIT, n_threads=1, n_repeats=1, n_prompt=32, n_said=32)
    return PickRequest(trial, min_speed, n_seq=n_seq)


def test_a_file_is_picked_and_explained_in_five_lines(model: Path, tmp_path: Path) -> None:
    target, svg = tmp_path / "out.gguf", tmp_path / "curve.svg"
    options = ["--memory", "500MB", "--context", "128", "--n-seq", "1"]
    options += ["--effort", "fast"]
    command = ["pick", str(model), "-o", str(target), *options, "--threads", "1"]
    done = CliRunner().invoke(app, [*command, "--svg", str(svg), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    starts = [line.partition(":")[0] for line in found["reasons"]]
    assert starts == ["memory", "size", "trial", "speed", "quality"]
    assert found["check"]["failures"] == []
    assert found["n_bytes"] == target.stat().st_size
    assert 0 <= found["kld_mean"] < 0.1
    assert svg.read_text().startswith("<svg")


def _timed_request(min_speed: float = 0.0, min_prompt_speed: float = 0.0) -> PickRequest:
    speeds = made_speeds(bytes_per_second=2e8)
    return dataclasses.replace(
        _request(min_speed), min_prompt_speed=min_prompt_speed, speeds=speeds
    )


def test_a_speed_out_of_reach_is_refused_with_the_largest_possible(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match=r"out of reach: the fastest plan .* makes about"):
        pick(model, tmp_path / "out.gguf", _timed_request(min_speed=1e9), threads=1)


def _of_speeds(monkeypatch: pytest.MonkeyPatch, *speeds: float) -> list[dict[str, Any]]:
    """Have trials find these speeds of generation, the last one for all others, and prompts tenfold
    of them; return the options of each file that is made.
    """
    made: list[dict[str, Any]] = []

    def quantized(*args: Any, **options: Any) -> Quantized:
        made.append(options)
        return ramgguf.quantize(*args, **options)

    def tried(path: Path, *more: Any, **options: Any) -> CheckResult:
        found = check_file(path, *more, **options)
        speed = speeds[min(len(made), len(speeds)) - 1]
        assert found.speed is not None
        spread = {"generation": Spread.of([speed]), "prompt": Spread.of([10 * speed])}
        return found.model_copy(update={"speed": found.speed.model_copy(update=spread)})

    monkeypatch.setattr(picking, "quantize", quantized)
    monkeypatch.setattr(picking, "check_file", tried)
    monkeypatch.setattr(speed_target, "time_file", as_planned)
    return made


def as_planned(path: Path, **_: object) -> Rates:
    rate = 2e8 / path.stat().st_size
    return Rates(n_prompt=64, prompt=(1e3,) * 3, generation=(rate,) * 3)


def test_a_least_speed_chooses_formats_by_their_speed_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _of_speeds(monkeypatch, 1e4)
    least = 3000.0  # more than with the best formats, which read 90 kB for a token
    picked = pick(model, tmp_path / "out.gguf", _timed_request(min_speed=least), threads=1)
    assert picked.plan.speed is not None
    assert picked.plan.speed.least_generation == least
    assert picked.plan.speed.is_measured
    assert picked.plan.speed.generation >= least
    assert picked.n_tried == len(made) == 1
    assert f"asked were {least:g}" in picked.reasons()[3]
    free = pick(model, tmp_path / "free.gguf", _request(), threads=1)
    assert free.plan.speed is None
    assert picked.plan.n_bytes < free.plan.n_bytes


def test_a_file_too_slow_in_its_trial_is_made_again_of_faster_formats(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = 1.2 * 2e8 / model.stat().st_size
    made = _of_speeds(monkeypatch, 0.8 * least, least)
    picked = pick(model, tmp_path / "out.gguf", _timed_request(min_speed=least), threads=1)
    assert [m["min_speed"] for m in made] == [least, pytest.approx(1.01 * least / 0.8)]
    assert picked.n_tried == 2
    made = _of_speeds(monkeypatch, 10.0)
    request = _timed_request(min_prompt_speed=101.0)
    with pytest.raises(BudgetError, match=r"100\.0 tokens/s of prompts were reached, 101 asked"):
        pick(model, tmp_path / "other.gguf", request, threads=1)
    assert [m["min_prompt_speed"] for m in made] == sorted(m["min_prompt_speed"] for m in made)
    assert len(made) == 4


def test_a_second_try_has_the_name_of_its_own_plan(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / model.name
    source.write_bytes(model.read_bytes())
    tries: list[Path] = []

    def checked(path: Path, *arguments: Any, **named: Any) -> CheckResult:
        found = check_file(path, *arguments, **named)
        tries.append(path)
        least = {"limit": (found.peak_bytes or 0) - 40_000}
        return found.model_copy(update=least if len(tries) == 1 else {})

    monkeypatch.setattr(picking, "check_file", checked)
    picked = pick(source, None, _request(), threads=1, min_sqnr_db=0.0)
    assert picked.n_tried == 2
    assert picked.path.name == f"bigram-ram-{picked.plan.bpw:.2f}bpw.gguf"
    assert picked.trial.path == str(picked.path)
    assert set(tmp_path.glob("*.gguf")) == {source, picked.path}


def test_an_effort_keeps_to_the_speed_or_the_file_before_it_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = 1.2 * 2e8 / model.stat().st_size
    made = _of_speeds(monkeypatch, least)

    def quantized(*args: Any, **options: Any) -> Quantized:
        made.append(options)
        if options.pop("effort", None) == "best":
            raise BudgetError("not fast enough")
        return ramgguf.quantize(*args, effort="fast", **options)

    monkeypatch.setattr(picking, "quantize", quantized)
    request = dataclasses.replace(_timed_request(min_speed=least), effort="best")
    picked = pick(model, tmp_path / "out.gguf", request, threads=1)
    assert [m["min_speed"] for m in made] == [least, least]
    assert picked.path.stat().st_size == picked.plan.n_bytes


def test_a_model_that_babbles_itself_is_not_picked(tmp_path: Path) -> None:
    path = write_bigram_model(tmp_path / "babbling.gguf", noise=12)
    with pytest.raises(EngineError, match=r"fails its trial: .*babbles"):
        pick(path, tmp_path / "out.gguf", _request(), threads=1)


def test_without_a_score_the_lines_say_so(model: Path, tmp_path: Path) -> None:
    picked = pick(model, tmp_path / "out.gguf", _request(), threads=1)
    assert picked.reasons()[-1] == "quality: not scored"
    assert picked.n_tried == 1
    assert picked.path.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_an_effort_makes_the_file_of_the_size_that_was_found_unless_that_fails_its_trial(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    asked, trials = [], []

    def quantized(source: Path, budget: Any = None, *more: Any, **options: Any) -> Quantized:
        asked.append((budget, options.pop("effort", None), options.pop("seconds", None)))
        if isinstance(budget, int):
            options["pins"] = ["token_embd=Q4_0"]  # so that the files differ
        return ramgguf.quantize(source, budget, *more, effort="fast", **options)

    def tried(path: Path, *more: Any, **options: Any) -> CheckResult:
        found = check_file(path, *more, **options)
        trials.append(found)
        is_bad = fails and len(trials) == 2
        return found.model_copy(update={"failures": ("it babbles",)}) if is_bad else found

    monkeypatch.setattr(picking, "quantize", quantized)
    monkeypatch.setattr(picking, "check_file", tried)
    request = dataclasses.replace(_request(), effort="best", effort_seconds=600.0)
    picked = pick(model, tmp_path / "out.gguf", request, threads=1, min_sqnr_db=0)
    assert len(trials) == 2
    assert asked[1][1] == "best"
    # What finding the size took, and the trial of the effort's file will take, is part of the time.
    assert 0 < asked[1][2] < 600
    assert asked[1][0] == trials[0].n_bytes
    formats = {a.name: a.format for a in picked.plan.assignments}
    assert (formats["token_embd.weight"] == "Q4_0") is not fails
    with open_gguf(picked.path) as file:
        assert file.tensor("token_embd.weight").type_name == formats["token_embd.weight"]
    assert len(asked) == (3 if fails else 2)


def test_the_time_of_pick_is_for_all_of_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding the size takes 40 s, of which the trial takes 10, and the score has 15 % of all."""
    now, given = [0.0], []

    def after(original: Any, seconds: float) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            now[0] += seconds
            return original(*args, **options)

        return call

    def quantized(*args: Any, **options: Any) -> Quantized:
        if options.pop("effort") != "fast":
            given.append(options.pop("seconds"))
        return ramgguf.quantize(*args, effort="fast", **options)

    monkeypatch.setattr(picking, "clock", lambda: now[0])
    monkeypatch.setattr(picking, "measure", after(ramgguf.measure, 30.0))
    monkeypatch.setattr(picking, "check_file", after(check_file, 10.0))
    monkeypatch.setattr(picking, "quantize", quantized)
    request = dataclasses.replace(_request(n_seq=1), effort="best", effort_seconds=200.0)
    pick(model, tmp_path / "a.gguf", request, threads=1)
    assert given == [200.0 - 40 - 10 - 30]
    said: list[str] = []
    short = dataclasses.replace(request, effort_seconds=50.0)
    picked = pick(model, tmp_path / "b.gguf", short, threads=1, announce=said.append)
    assert len(given) == 1
    assert picked.path.stat().st_size == picked.plan.n_bytes
    assert any("the file by priors stays" in line and "--time" in line for line in said)


def test_the_command_passes_effort_and_time_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[PickRequest] = []

    def picked(source: Path, output: Path, request: PickRequest, **options: Any) -> Any:
        asked.append(request)
        return pick(source, output, dataclasses.replace(request, effort="fast"), **options)

    monkeypatch.setattr(pick_commands, "_pick", picked)
    base = ["pick", str(model), "--memory", "500MB", "--context", "128", "--n-seq", "0", "-t", "1"]
    for options in (["--time", "20m"], ["--effort", "auto", "--time", "90s"], []):
        target = str(tmp_path / f"{len(asked)}.gguf")
        done = CliRunner().invoke(app, [*base, "-o", target, *options])
        assert done.exit_code == 0, done.output
    told = [(request.effort, request.effort_seconds) for request in asked]
    assert told == [("best", 1200.0), ("auto", 90.0), ("auto", None)]
    wrong = CliRunner().invoke(app, [*base, "--effort", "fast", "--time", "20m"])
    assert wrong.exit_code == 2
