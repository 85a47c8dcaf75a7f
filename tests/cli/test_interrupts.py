"""Ctrl-C, whenever it comes: exit status 130, one line, no traceback."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from interruptible import unwatched
from tiny_models import write_tiny_model

RAMGGUF = str(Path(sys.executable).with_name("ramgguf"))
# Runs the command with Ctrl-C at the moment that a module is about to be imported.
_AT_IMPORT = """
import builtins, os, signal, sys
wanted, real = sys.argv.pop(1), builtins.__import__

def imported(name, *rest, **options):
    if name == wanted and not imported.done:
        imported.done = True
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **options)

imported.done = False
builtins.__import__ = imported
from ramgguf.cli import main
main()
"""


@pytest.mark.parametrize(
    "module", ["typer", "numpy", "pydantic", "ramgguf.cli.app", "ramgguf.plan.result"]
)
def test_ctrl_c_during_imports_is_one_line(tmp_path: Path, module: str) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    command = [sys.executable, "-c", _AT_IMPORT, module, "measure", str(model)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=unwatched(), cwd=tmp_path
    )
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("command", [[RAMGGUF], [sys.executable, "-m", "ramgguf"]])
def test_ctrl_c_at_any_moment_ends_with_130(tmp_path: Path, command: list[str]) -> None:
    """From the moment on that Python runs our code: before, its own start would say so."""
    model = write_tiny_model(tmp_path / "m.gguf")
    rng = random.Random(0)
    for _ in range(4):
        with subprocess.Popen(
            [*command, "measure", str(model), "-o", str(tmp_path / "o.json"), "--force"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=unwatched(),
        ) as process:
            assert process.stderr is not None
            while process.poll() is None and not _catches_ctrl_c(process.pid):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.8))
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert "Traceback" not in said
        assert process.returncode in (0, 130), said
        assert said.startswith("interrupted") or process.returncode == 0
    assert {p.name for p in tmp_path.iterdir()} <= {"m.gguf", "o.json"}


def _catches_ctrl_c(pid: int) -> bool:
    """Return whether the process has come to the point where numpy is looked for, or beyond."""
    try:
        return "_core" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


_TWICE = """
import os, signal, sys
from ramgguf.cli import app

real = app.contextlib.suppress
def cleaning_up(*kinds):
    os.kill(os.getpid(), signal.SIGINT)
    return real(*kinds)

def slow(*_, **__):
    app.contextlib.suppress = cleaning_up
    os.kill(os.getpid(), signal.SIGINT)

app.app = slow
app.main(is_interruptible=True)
"""


def test_a_second_ctrl_c_does_not_wait_and_is_no_traceback() -> None:
    command = [sys.executable, "-c", _TWICE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=unwatched())
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_where_ctrl_c_is_ignored_it_stays_ignored(tmp_path: Path) -> None:
    """As in the background of a script."""
    model = write_tiny_model(tmp_path / "m.gguf")
    script = f"trap '' INT; {RAMGGUF} recipe {model} & sleep 0.1; kill -INT $!; wait $!"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=unwatched()
    )
    assert done.returncode == 0, done.stderr


def test_the_package_offers_its_verbs_whatever_was_imported_first() -> None:
    code = (
        "import ramgguf.plan.result, ramgguf.quantize.pipeline, ramgguf;"
        "from ramgguf.measure import measure;"
        "assert ramgguf.measure is measure;"
        "assert all(callable(getattr(ramgguf, n)) for n in ramgguf.__all__ if n[0] != '_');"
        "assert set(ramgguf.__all__) <= set(dir(ramgguf));"
        "assert not hasattr(ramgguf, 'nothing')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
