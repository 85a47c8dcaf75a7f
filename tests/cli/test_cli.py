"""The command line, as users see it: output, JSON, errors and exit status."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import ramgguf
from gguf_samples import write_model
from interruptible import unwatched
from ramgguf import _core
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))


def run(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [RAMGGUF, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model-f16.gguf", rng=np.random.default_rng(0))


def test_measure_plan_quantize_step_by_step_equals_quantize(model: Path, tmp_path: Path) -> None:
    curves, plan, types = tmp_path / "m.json", tmp_path / "p.json", tmp_path / "types.txt"
    run("measure", model, "-o", curves)
    assert Measurement.load(curves).source.path == str(model)
    shown = run(
        "plan", curves, "-b", "5bpw", "-o", plan, "--export-tensor-types", types, "-v"
    ).stdout
    assert "proven" in shown
    assert "1 % more budget" in shown
    assert "blk.0.attn_q.weight" in shown
    assert "^blk\\.0\\.attn_q\\.weight$=" in types.read_text()
    assert Plan.load(plan).n_bytes <= Plan.load(plan).budget
    run("quantize", model, "--plan", plan, "-o", tmp_path / "a.gguf")
    done = run("quantize", model, "-b", "5bpw", "-o", tmp_path / "b.gguf", "--effort", "fast")
    assert "every tensor decoded again: errors as planned" in done.stdout
    assert done.stderr == ""  # no progress bars where there is no terminal
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_options_that_a_ready_value_leaves_without_effect_are_refused(
    model: Path, tmp_path: Path
) -> None:
    curves, plan, frontier = (tmp_path / f"{name}.json" for name in ("m", "p", "f"))
    output = tmp_path / "o.gguf"
    run("measure", model, "-o", curves)
    run("plan", curves, "-b", "9bpw", "-o", plan)
    run("curve", curves, "-o", frontier)
    quantize: list[str | Path] = ["quantize", model, "-o", output]
    cases: list[tuple[list[str | Path], str]] = [
        ([*quantize, "--plan", plan, "--pin", "attn_q=Q8_0"], "--pin"),
        ([*quantize, "--plan", plan, "--encoder", "rtn"], "--encoder"),
        (
            [*quantize, "--plan", plan, "--formats", "Q8_0", "--min-sqnr", "3"],
            "--formats, --min-sq",
        ),
        ([*quantize, "--measurement", curves, "-b", "9bpw", "--allow-requantize"], "--allow-requ"),
        (["plan", curves, "--recipe", plan, "--tie", "qkv"], "--tie"),
        (["curve", frontier, "--objective", "nmse"], "--objective"),
    ]
    for words, option in cases:
        said = " ".join(run(*words, status=2).stderr.replace("│", " ").split())
        assert f"{option}" in said
        assert "no effect" in said
    assert not output.exists()
    run(*quantize, "--plan", plan)


def test_json_is_one_document_and_nothing_else(model: Path, tmp_path: Path) -> None:
    done = run(
        "quantize", model, "-b", "5bpw", "-o", tmp_path / "b.gguf", "--json", "--effort", "fast"
    )
    result = json.loads(done.stdout)
    assert result["n_bytes"] == (tmp_path / "b.gguf").stat().st_size <= result["budget"]
    assert result["verified"] is True
    measured = json.loads(run("measure", model, "-o", tmp_path / "m.json", "--json").stdout)
    assert measured["schema"] == "ramgguf.measurement/2"
    planned = json.loads(run("plan", tmp_path / "m.json", "-b", "5bpw", "--json").stdout)
    assert planned["schema"].startswith("ramgguf.plan/")


def test_quiet_prints_nothing(model: Path, tmp_path: Path) -> None:
    done = run(
        "quantize",
        model,
        "-b",
        "5bpw",
        "-o",
        tmp_path / "b.gguf",
        "-q",
        "--no-verify",
        "--effort",
        "fast",
    )
    assert done.stdout == done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("quantize", "MODEL", "-b", "1kB"), 1, "error: budget 1.00 kB"),
        (("quantize", "nowhere.gguf", "-b", "1GB"), 1, "error: nowhere.gguf"),
        (("quantize", "MODEL", "-b", "many"), 1, "error: budget 'many' is not a size"),
        (("quantize", "MODEL"), 2, "--budget"),
        (("quantize", "MODEL", "-b", "5bpw", "--encoder", "magic"), 2, "rtn, search"),
        (("quantize", "MODEL", "-b", "5bpw", "--formats", "Q9_K"), 1, "error: format 'Q9_K'"),
        (("plan", "MODEL", "-b", "5bpw"), 1, "error: "),
        (("frobnicate",), 2, "No such command"),
    ],
)
def test_errors_are_one_line_and_a_status(
    arguments: tuple[str, ...], status: int, said: str, model: Path
) -> None:
    words = [str(model) if a == "MODEL" else a for a in arguments]
    done = run(*words, status=status)
    assert said in done.stderr
    assert done.stdout == ""
    if status == 1:
        assert len(done.stderr.splitlines()) == 1


def test_an_existing_plan_is_refused_before_the_model_is_written(
    model: Path, tmp_path: Path
) -> None:
    plan, output = tmp_path / "p.json", tmp_path / "b.gguf"
    plan.write_text("older")
    command = (
        "quantize",
        model,
        "-b",
        "5bpw",
        "-o",
        output,
        "--save-plan",
        plan,
        "--effort",
        "fast",
    )
    assert "--force" in run(*command, status=1).stderr
    assert not output.exists()
    assert plan.read_text() == "older"
    run(*command, "--force")
    assert Plan.load(plan).n_bytes == output.stat().st_size


def test_every_command_explains_itself_with_an_example() -> None:
    commands = ("quantize", "measure", "plan", "eval", "compare", "report", "frontier", "explain")
    for command in (*commands, "diff", "recipe"):
        shown = run(command, "--help").stdout
        assert f"Example: ramgguf {command}" in " ".join(shown.split())


def test_the_version_names_the_package_the_build_and_the_isa_level() -> None:
    assert ramgguf.__version__ == metadata.version("ramgguf")
    shown = run("--version").stdout
    assert shown.startswith(f"ramgguf {ramgguf.__version__} (")
    assert _core.compiler in shown
    assert f"ISA level {_core.isa()} of" in shown


def test_ctrl_c_leaves_an_older_output_and_the_source_untouched(tmp_path: Path) -> None:
    import signal
    import time

    rng = np.random.default_rng(1)
    source = write_model(tmp_path / "a.gguf", rng=rng, n_layers=24, width=1024)
    older, before = tmp_path / "b.gguf", source.read_bytes()
    older.write_bytes(b"older")
    for delay in (0.3, 0.8, 1.2):
        command = [
            RAMGGUF,
            "quantize",
            str(source),
            "-b",
            "5bpw",
            "-o",
            str(older),
            "--force",
            "--effort",
            "fast",
        ]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=unwatched()
        ) as process:
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert older.read_bytes()[:5] in (b"older", b"GGUF\x03")
    assert source.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"a.gguf", "b.gguf"}


def test_a_split_output_loads_as_one(model: Path, tmp_path: Path) -> None:
    run(
        "quantize",
        model,
        "-b",
        "5bpw",
        "-o",
        tmp_path / "s.gguf",
        "--split-max-size",
        "200kB",
        "--effort",
        "fast",
    )
    shards = sorted(tmp_path.glob("s-*-of-*.gguf"))
    assert len(shards) > 1


def test_commands_do_not_wait_for_libraries_that_they_do_not_use() -> None:
    """A start of Python is half of what a small model takes: scipy alone would double it."""
    slow = ("scipy", "plotly", "datasets", "llama_cpp", "dask", "huggingface_hub", "pandas")
    code = f"import sys, ramgguf.cli; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
