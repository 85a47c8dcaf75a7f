"""A vision projector and a draft model run in the same memory, and count."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from typer.testing import CliRunner

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.beside import BesideModel
from ramgguf.deploy.footprint import FootprintEstimator
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import MemoryBudget
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

SHAPE = ContextShape(1024)
LIMIT = 120_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    write_tiny_model(folder / "m.gguf", weight_type="F16")
    write_tiny_model(folder / "draft.gguf", n_layers=1, seed=3)
    write_tiny_model(folder / "other.gguf", extra_tokens=200)
    writer = GGUFWriter(folder / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_q.weight", np.zeros((1000, 1000), np.float16))
    writer.add_tensor("v.post_ln.bias", np.zeros(1000, np.float32))
    finish_gguf(writer)
    return folder


@pytest.fixture(scope="module")
def measurement(folder: Path) -> Measurement:
    return ramgguf.measure(folder / "m.gguf", threads=1)


def _memory(measurement: Measurement, beside: BesideModel, limit: int = LIMIT) -> MemoryBudget:
    request = MemoryRequest(SHAPE, limit, beside=beside)
    found = ramgguf.plan(measurement, MemoryLimit(request), min_sqnr_db=0).memory
    assert found is not None
    return found


def test_a_projector_takes_the_bytes_of_its_tensors(folder: Path, measurement: Measurement) -> None:
    alone = _memory(measurement, BesideModel())
    both = _memory(measurement, BesideModel(mmproj=folder / "mmproj.gguf"))
    assert alone.beside == ()
    (projector,) = both.beside
    assert projector.weights == projector.total == 2_000_000 + 4_000
    assert both.ram.overhead - alone.ram.overhead == projector.total


def test_a_draft_model_takes_weights_cache_and_buffers_as_llama_cpp_counts_them(
    folder: Path, measurement: Measurement
) -> None:
    with (
        open_gguf(folder / "draft.gguf") as file,
        FootprintEstimator(file) as estimator,
    ):
        use = estimator.footprint(SHAPE, {}).use
    both = _memory(measurement, BesideModel(draft=folder / "draft.gguf"))
    (draft,) = both.beside
    assert (draft.weights, draft.cache, draft.compute) == (use.weights, use.cache, use.compute)
    assert draft.cache > 0
    alone = _memory(measurement, BesideModel())
    assert both.ram.overhead - alone.ram.overhead == draft.total


def test_what_runs_beside_leaves_less_for_the_weights(
    folder: Path, measurement: Measurement
) -> None:
    tight = _memory(measurement, BesideModel()).ram
    limit = tight.total - tight.weights // 5
    assert _memory(measurement, BesideModel(), limit).ram.weights < tight.weights
    with pytest.raises(BudgetError, match=r"does not fit .*mmproj\.gguf: 2\.00 MB"):
        _memory(measurement, BesideModel(mmproj=folder / "mmproj.gguf"), limit)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (BesideModel(mmproj=Path("draft.gguf")), "expected a vision projector"),
        (BesideModel(draft=Path("other.gguf")), "needs the model's vocabulary"),
    ],
)
def test_files_that_are_something_else_are_refused(
    folder: Path,
    measurement: Measurement,
    beside: BesideModel,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(BudgetError, match=said):
        _memory(measurement, beside)


def test_the_command_counts_both_and_prints_the_options_to_run_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    command = ["quantize", "m.gguf", "--memory", "200MB", "--context", "1024", "--effort", "fast"]
    options = ["--mmproj", "mmproj.gguf", "--draft", "draft.gguf", "-t", "1", "-o"]
    run = CliRunner().invoke
    done = run(app, [*command, *options, str(tmp_path / "a.gguf"), "--json"])
    assert done.exit_code == 0, done.output
    assert [b["kind"] for b in json.loads(done.stdout)["memory"]["beside"]] == ["mmproj", "draft"]
    shown = run(app, [*command, "--vram", "600MB", *options, str(tmp_path / "b.gguf")])
    text = " ".join(shown.output.split())
    assert "--mmproj mmproj.gguf --no-mmproj-offload -md draft.gguf -ngld 0" in text
    assert "the overhead includes mmproj.gguf: weights 2.00 MB" in text
    idle = run(app, ["quantize", "m.gguf", "-b", "90%", "--mmproj", "mmproj.gguf"])
    assert idle.exit_code == 2
