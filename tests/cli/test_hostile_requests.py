"""Requests that nobody means: one line and exit status 1, soon and in little memory."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.errors import RamggufError
from tiny_models import write_tiny_model

DIGITS = "9" * 400
REQUESTS = (
    f"quantize m.gguf -b {DIGITS}B -o q.gguf",
    f"quantize m.gguf -b 0.{'0' * 400}1 -o q.gguf",
    f"quantize m.gguf -b {DIGITS}% -o q.gguf",
    f"quantize m.gguf --memory {DIGITS} --context 512 -o q.gguf",
    f"quantize m.gguf -b 50% --split-max-size {DIGITS} -o q.gguf",
    f"plan m.rd.json -b {DIGITS}bpw",
    f"curve m.rd.json -b {DIGITS}",
    f"sensitivity m.gguf --time {DIGITS}h",
    "plan /dev/zero -b 5MB",
    "plan m.rd.json --recipe /dev/zero",
    "plan m.rd.json -b 60% --sensitivity /dev/zero",
    "curve /dev/zero",
    "explain /dev/zero -m m.rd.json",
    "explain plan.json -m /dev/zero",
    "diff /dev/zero m.gguf",
    "recipe /dev/zero",
    "card m.gguf --plan /dev/zero",
    "card m.gguf --check /dev/zero",
    "card m.gguf --results /dev/zero",
    "measure /dev/zero",
    "measure m.gguf --imatrix /dev/zero -o y.json",
    "measure m.gguf --imatrix m.gguf --hessian /dev/zero --encoder gptq -o y.json",
    "quantize m.gguf --plan /dev/zero -o q.gguf",
    "quantize m.gguf -b 50% --measurement /dev/zero -o q.gguf",
    "perturb m.gguf --like /dev/zero -o q.gguf",
    "compare /dev/zero",
    "report /dev/zero -o r.html",
    "eval m.gguf --text /dev/zero",
    "serve m.gguf --check /dev/zero",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    measured = ramgguf.measure(write_tiny_model(folder / "m.gguf"), threads=1)
    measured.save(folder / "m.rd.json")
    ramgguf.plan(measured, "50%", min_sqnr_db=0).save(folder / "plan.json")
    return folder


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: r.replace(DIGITS, "9…"))
def test_a_request_that_cannot_be_met_is_an_error_of_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(p.name for p in folder.iterdir())
    done = CliRunner().invoke(app, request_.split())
    if not isinstance(done.exception, RamggufError):  # a usage error has been told
        assert done.exit_code == 2, (done.output, done.exception)
    else:
        assert str(done.exception).isprintable()
    assert sorted(p.name for p in folder.iterdir()) == before
