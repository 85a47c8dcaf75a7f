"""--max-kld: the smallest file whose measured KLD stays below a bound."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, PlanError
from ramgguf.evaluate.held_out import HeldOutScore, WindowScore
from ramgguf.quantize import kld_target, pipeline
from ramgguf.quantize.kld_target import TOLERANCE, _Bracket
from ramgguf.quantize.preselection import MANY_WEIGHTS
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")


def _score(kld: float, part: str) -> HeldOutScore:
    window = WindowScore(
        domain="prose", n_tokens=100, kld_sum=100 * kld, nll_sum=310.0, reference_nll_sum=300.0,
        n_same_top=90,
    )  # fmt: skip
    return HeldOutScore(
        ramgguf_version="0", model="a", n_bytes=1, reference="b", part=part, n_ctx=108,
        first_target=8, engine="e", windows=(window,), seconds=1.0,
    )  # fmt: skip


def _of_bytes(monkeypatch: pytest.MonkeyPatch, stricter: float = 1.0) -> list[int]:
    """Have files score by their bytes, on the verifying text `stricter` times as much."""
    sizes: list[int] = []

    def score(models: Any, _: Path, *, part: str, **__: Any) -> tuple[HeldOutScore, ...]:
        sizes.append(models[0].stat().st_size)
        kld = 5 * math.exp(-sizes[-1] / 12_000)
        return (_score(kld * (stricter if part == "score" else 1), part),)

    monkeypatch.setattr(kld_target, "score_held_out", score)
    return sizes


@pytest.mark.parametrize("max_kld", [0.01, 0.003, 0.0008])
@pytest.mark.parametrize("stricter", [1.0, 1.7])
@pytest.mark.parametrize("many_weights", [1, MANY_WEIGHTS])  # from which on formats are preselected
def test_the_smallest_file_within_the_bound_is_found(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_kld: float,
    stricter: float,
    many_weights: int,
) -> None:
    monkeypatch.setattr(pipeline, "MANY_WEIGHTS", many_weights)
    sizes = _of_bytes(monkeypatch, stricter)
    output = tmp_path / "out.gguf"
    made = ramgguf.quantize(tiny, None, output, max_kld=max_kld, min_sqnr_db=0, threads=1)
    assert made.score is not None
    assert made.score.part == "score"
    assert made.score.overall().kld.value <= max_kld
    assert made.worst_departure is not None
    assert made.n_bytes == output.stat().st_size == made.plan.n_bytes
    # Plans of a tiny model are steps: the next smaller one breaks the bound.
    smaller = made.n_bytes
    measured = ramgguf.measure(tiny, threads=1)
    while (smaller := ramgguf.plan(measured, smaller - 1, min_sqnr_db=0).n_bytes) > made.n_bytes * (
        1 - TOLERANCE
    ):
        pass
    assert 5 * stricter * math.exp(-smaller / 12_000) > 0.97 * max_kld
    assert len(sizes) <= kld_target.MAX_TRIALS + 3
    assert any("the smallest of" in note for note in made.plan.notes)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-f16.gguf", "out.gguf"}


def test_a_bound_that_nothing_keeps_or_that_is_none_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kld_target, "score_held_out", lambda *_, part, **__: (_score(1.0, part),))
    with pytest.raises(PlanError, match=r"above 0\.01; raise --max-kld|no file that is smaller"):
        ramgguf.quantize(tiny, None, tmp_path / "o.gguf", max_kld=0.01, threads=1)
    done = CliRunner().invoke(app, ["quantize", str(tiny), "--max-kld", "0"])
    assert done.exit_code == 1
    assert isinstance(done.exception, PlanError)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="expected a positive number"):
            ramgguf.quantize(tiny, None, tmp_path / "o.gguf", max_kld=bad)
    with pytest.raises(PlanError, match="max_kld finds the budget"):
        ramgguf.quantize(tiny, "50%", tmp_path / "o.gguf", max_kld=0.1)
    assert {p.name for p in tmp_path.iterdir()} == {"tiny-f16.gguf"}


def test_the_smallest_plan_is_enough_for_a_loose_bound(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _of_bytes(monkeypatch)
    made = ramgguf.quantize(tiny, None, tmp_path / "o.gguf", max_kld=100.0, threads=1)
    assert made.measurement is not None
    with pytest.raises(BudgetError) as refused:
        ramgguf.plan(made.measurement, 1)
    smallest = refused.value.smallest
    assert smallest is not None
    assert made.n_bytes <= smallest * (1 + TOLERANCE)


def test_a_guess_stays_within_its_bracket() -> None:
    bracket = _Bracket(1000, 9000, 10_000, 0.5, 0.001)
    for bound in (1e-9, 0.01, 0.4, 10.0):
        assert 1000 < bracket.next(bound, 1) < 9000


def test_for_real_the_command_verifies_the_bound_on_text_that_nothing_else_used(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    monkeypatch.setattr(kld_target, "SCORE_SECONDS", 0.1)
    command = ["quantize", tiny.name, "--max-kld", "0.05", "-o", "o.gguf", "--json", "-t", "1"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["score"]["kld"] <= 0.05 if "kld" in said["score"] else said["score"]
    for more in (["-b", "50%"], ["--refine", "2"], ["--no-score"], ["--effort", "auto"]):
        command = ["quantize", tiny.name, "--max-kld", "0.05", "-o", "p.gguf", *more]
        assert CliRunner().invoke(app, command).exit_code == 2
