"""One command from a model to a file that is proven to run here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ramgguf
from bigram_model import write_bigram_model
from ramgguf import Quantized
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import Available
from ramgguf.deploy import picking
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.picking import PickRequest, pick
from ramgguf.deploy.result import CheckResult
from ramgguf.gguf.reader import open_gguf

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
    options = ["--memory", "500MB", "--context", "128", "--min-speed", "1", "--n-seq", "1"]
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


def test_a_speed_out_of_reach_is_refused_with_what_was_reached(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"does not fit|tokens/s were reached"):
        pick(model, tmp_path / "out.gguf", _request(min_speed=1e9), threads=1)


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

    def quantized(source: Path, budget: int | None = None, *more: Any, **options: Any) -> Quantized:
        asked.append((budget, options.pop("effort", None), options.pop("seconds", None)))
        if budget is not None:
            options["pins"] = ["token_embd=Q4_0"]  # so that the files differ
        return ramgguf.quantize(source, budget, *more, effort="fast", **options)

    def tried(path: Path, *more: Any, **options: Any) -> CheckResult:
        found = check_file(path, *more, **options)
        trials.append(found)
        is_bad = fails and len(trials) == 2
        return found.model_copy(update={"failures": ("it babbles",)}) if is_bad else found

    monkeypatch.setattr(picking, "quantize", quantized)
    monkeypatch.setattr(picking, "check_file", tried)
    request = dataclasses.replace(_request(), effort="best", effort_seconds=60.0)
    picked = pick(model, tmp_path / "out.gguf", request, threads=1, min_sqnr_db=0)
    assert len(trials) == 2
    assert asked[1][1:] == ("best", 60.0)
    assert asked[1][0] == trials[0].n_bytes
    formats = {a.name: a.format for a in picked.plan.assignments}
    assert (formats["token_embd.weight"] == "Q4_0") is not fails
    with open_gguf(picked.path) as file:
        assert file.tensor("token_embd.weight").type_name == formats["token_embd.weight"]
    assert len(asked) == (3 if fails else 2)
