"""The examples run from a model to their last line."""

import subprocess
import sys
from pathlib import Path

import pytest

from bigram_model import write_bigram_model
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str, *arguments: str | Path, status: int = 0) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return (done.stdout if status != 1 else done.stderr).splitlines()


def test_a_model_is_fitted_and_proven_to_run(tmp_path: Path) -> None:
    model = write_bigram_model(tmp_path / "m.gguf", noise=0.3, n_context=4096)
    out = tmp_path / "small.gguf"
    options = ("--output", out, "--budget", "60kB", "--memory", "500MB", "--context", "128")
    lines = _run("fit_a_model.py", model, *options)
    assert "optimal plans from" in lines[0]
    assert any(line.startswith("plan: ") for line in lines)
    assert f"wrote {out}: {out.stat().st_size:,} bytes" in lines
    assert out.stat().st_size <= 60_000
    assert lines[-2].startswith("it runs, with ")
    assert lines[-1].endswith(" threads")
    with open_gguf(out) as made, open_gguf(model) as source:
        assert [t.name for t in made.tensors] == [t.name for t in source.tensors]
        measured = Measurement.load(out.with_suffix(".rd.json"))
        assert [t.name for t in measured.tensors] == [t.name for t in source.tensors]


def test_a_model_that_does_not_run_is_a_failure_with_advice(tmp_path: Path) -> None:
    model = write_bigram_model(tmp_path / "m.gguf", n_context=4096)
    options = ("--budget", "60kB", "--memory", "20MB", "--context", "512")
    lines = _run("fit_a_model.py", model, *options, status=3)
    assert any(line.startswith("it fails: loading it under the limit failed") for line in lines)
    assert any(line.startswith("  change: ") for line in lines)


def test_two_plans_of_one_size_are_scored_and_ranked(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "t-f16.gguf", weight_type="F16", n_layers=4)
    options = ("--budget", "6bpw", "--objectives", "nmse", "ram", "--n-seq", "4", "--n-ctx", "64")
    lines = _run("compare_plans.py", model, *options)
    files = [tmp_path / "t-f16-nmse.gguf", tmp_path / "t-f16-ram.gguf"]
    for file, line in zip(files, lines, strict=False):
        assert line.startswith(f"{file.name}: {file.stat().st_size:,} bytes")
    assert "tensors have another format" in lines[2]
    assert not lines[2].startswith("0 ")
    klds = [float(line.split()[-4]) for line in lines[3:5]]
    assert all(0 < kld < 5 for kld in klds)
    better = "t-f16-nmse" if klds[0] < klds[1] else "t-f16-ram"
    assert any(line.startswith(f"by mean_kld: {better} < ") for line in lines)


def test_what_is_no_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_text("no")
    (line,) = _run("compare_plans.py", path, status=1)
    assert line.startswith(f"error: {path}: ")
