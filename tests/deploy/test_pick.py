"""One command from a model to a file that is proven to run here."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bigram_model import write_bigram_model
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import Available
from ramgguf.deploy.checking import CheckRequest
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.picking import PickRequest, pick

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
