"""Faults while llama.cpp computes: kills of sensitivity and eval, full disks, files cut short.

After each the source is as it was, an older output is intact or replaced by a whole one, no process
and no folder is left behind, and what was finished before is not computed again: the next run ends
with the numbers of an undisturbed one. `make soak` sets RAMGGUF_KILLS to 50 and more.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import ramgguf
from conftest import fill_disk
from ramgguf.cli.sensitivity_commands import sensitivity as sensitivity_command
from ramgguf.cluster import session_cache
from ramgguf.core import scratch
from ramgguf.core.corpus import Corpus, default_corpus
from ramgguf.core.errors import EngineError, GGUFError, ImatrixError, PlanError, RamggufError
from ramgguf.core.progress import Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.evaluate.evaluation import score_models
from ramgguf.evaluate.journal import Journal, read_results
from ramgguf.evaluate.protocol import EvalProtocol
from ramgguf.evaluate.result import EvalResult
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.client import CrashError, Engine
from ramgguf.quants.hessian import load_hessians
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.sensitivity.result import Sensitivity
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")
KILLS = int(os.environ.get("RAMGGUF_KILLS", "4"))
EXCERPT = Corpus("excerpt", default_corpus().text[:3000])
TINY = EvalProtocol(EXCERPT, n_ctx=64, n_seq=60)
REAL = EvalProtocol(Corpus("longer excerpt", default_corpus().text[:40_000]), n_ctx=128, n_seq=6)

_TESTS = os.pathsep.join(str(p) for p in Path(__file__).parents[:2])

# One command, started when everything is imported: its arguments are paths, the last is the output.
_WORK = """
import sys
from pathlib import Path
import llama_cpp
import test_faults_engine as this
print("ready", flush=True)
sys.stdin.readline()
getattr(this, sys.argv[1])(*map(Path, sys.argv[2:]))
"""


def run_sensitivity(model: Path, output: Path) -> None:
    """Run the command, which has a copy of the model beside the output meanwhile."""
    sensitivity_command(
        model,
        output,
        tokens="random",
        sequences=1,
        scratch=output.parent / "scratch",
        force=True,
        threads=1,
        quiet=True,
    )


def run_eval(model: Path, reference: Path, output: Path) -> None:
    """Score both models against the reference, going on with what the output has."""
    protocol = REAL if model.stat().st_size > 10**8 else TINY
    models = [reference, model]
    score_models(
        models, reference=reference, protocol=protocol, threads=1, jsonl=output, resume=True
    )


def _numbers(journal: Path) -> list[EvalResult]:
    """Return the results without the seconds that they took."""
    zero = {"seconds": 0.0, "decode_seconds": 0.0}
    return [r.model_copy(update=zero) for r in read_results(journal)]


@dataclass(frozen=True)
class Killed:
    """How a command came to its end: the lines that its journal had then, whole or not."""

    n_lines: int
    finished: bool


def _kill_after(
    n_lines: int, delay: float, journal: Path, command: str, *arguments: Path
) -> Killed:
    """Run the command and kill it that long after its journal has so many lines."""
    mark = uuid.uuid4().hex
    environment = {**os.environ, "RAMGGUF_TEST": mark, "PYTHONPATH": _TESTS}
    with subprocess.Popen(
        [sys.executable, "-c", _WORK, command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdin.write(b"go\n")
        process.stdin.flush()
        while process.poll() is None and _count_lines(journal) < n_lines:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    _wait_for_orphans(mark)
    assert process.returncode in (0, -signal.SIGKILL)
    return Killed(_count_lines(journal), process.returncode == 0)


def _count_lines(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _wait_for_orphans(mark: str) -> None:
    """Wait until no process has the mark in its environment: the engine's child ends by itself."""
    deadline = time.monotonic() + 30
    while left := [p for p in Path("/proc").glob("[0-9]*/environ") if mark in _read(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


def _moments(n_lines: int, rng: np.random.Generator, n: int) -> list[tuple[int, float]]:
    """Return n random moments of a run: after so many lines of its journal, so many seconds.

    Delays are of all sizes from 0.1 to 50 ms: a fast machine finishes a tiny run in the longest.
    """
    lines: NDArray[np.int64] = rng.integers(0, n_lines, n)
    delays = 10 ** rng.uniform(-4, np.log10(0.05), n)
    return list(zip(lines.tolist(), delays.tolist(), strict=True))


def test_kills_of_sensitivity_leave_an_older_or_complete_output(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "scratch").mkdir(parents=True)
    model = write_tiny_model(tmp_path / "tiny.gguf", weight_type="F16")
    before = model.read_bytes()
    undisturbed, target = tmp_path / "undisturbed", folder / "target"
    journal = folder / "target.partial"
    (tmp_path / "scratch").mkdir()
    run_sensitivity(model, undisturbed)
    expected = Sensitivity.load(undisturbed).model_copy(update={"seconds": 0.0})
    n_resumed = 0
    for n_lines, delay in _moments(len(expected.tensors), np.random.default_rng(3), KILLS):
        target.write_bytes(b"older")
        killed = _kill_after(n_lines, delay, journal, "run_sensitivity", model, target)
        if not killed.finished and target.read_bytes() != b"older":
            Sensitivity.load(target)  # whole
        assert model.read_bytes() == before
        n_resumed += 1 < killed.n_lines < 1 + len(expected.tensors)
        run_sensitivity(model, target)
        assert Sensitivity.load(target).model_copy(update={"seconds": 0.0}) == expected
        assert sorted(p.name for p in folder.iterdir()) == ["scratch", "target"]
        assert not list((folder / "scratch").iterdir())
    assert n_resumed > 0  # else no kill was in the middle of the readings


@pytest.mark.parametrize("kind", ["tiny", "real"])
def test_kills_of_eval_lose_nothing_that_was_finished(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "tiny":
        model = write_tiny_model(tmp_path / "near.gguf", noise=0.02)
        reference = write_tiny_model(tmp_path / "base.gguf")
    elif KILLS < 10:
        pytest.skip("kills of a real model's evaluation take minutes: `make soak`")
    else:
        model, reference = (request.getfixturevalue(n) for n in ("smol135", "smol768"))
    stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in (model, reference)]
    undisturbed, target = tmp_path / "undisturbed", tmp_path / "target"
    run_eval(model, reference, undisturbed)
    expected = _numbers(undisturbed)
    n_all = _count_lines(undisturbed)
    n_kills = KILLS if kind == "tiny" else 10
    n_resumed = 0
    for n_lines, delay in _moments(n_all, np.random.default_rng(4), n_kills):
        target.unlink(missing_ok=True)
        killed = _kill_after(n_lines, delay, target, "run_eval", model, reference, target)
        run_eval(model, reference, target)
        assert _numbers(target) == expected
        # What was finished is not computed again.
        assert _count_lines(target) == n_all
        n_resumed += 2 < killed.n_lines < n_all
    assert n_resumed > 0  # else no kill was in the middle of the sequences
    assert [(p.stat().st_size, p.stat().st_mtime_ns) for p in (model, reference)] == stamps


def test_a_line_cut_short_anywhere_is_dropped_and_computed_again(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    journal = tmp_path / "journal"
    protocol = EvalProtocol(EXCERPT, n_ctx=64, n_seq=2)

    def go_on() -> None:
        score_models([model], protocol=protocol, threads=1, jsonl=journal, resume=True)

    go_on()
    whole, expected = journal.read_bytes(), _numbers(journal)
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for n_bytes in (last, last + 1, (last + len(whole)) // 2, len(whole) - 1):
        journal.write_bytes(whole[:n_bytes])
        go_on()
        assert _numbers(journal) == expected
        assert _count_lines(journal) == whole.count(b"\n")


@pytest.mark.parametrize("what", ["sensitivity", "eval"])
def test_a_second_writer_of_one_journal_is_refused(what: str, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    output = tmp_path / "output"
    (tmp_path / "scratch").mkdir()
    journal = output if what == "eval" else tmp_path / "output.partial"
    error = EngineError if what == "eval" else PlanError
    arguments = (model, model, output) if what == "eval" else (model, output)
    run: Callable[..., None] = run_eval if what == "eval" else run_sensitivity
    with Journal(journal, resume=False):
        with pytest.raises(error, match="another process is writing"):
            run(*arguments)
        assert journal.read_bytes() == b""  # it is the first writer's
    assert not journal.exists()  # who wrote nothing


def _readings(model: Path, disk: Path) -> None:
    ramgguf.sensitivity(model, tokens="random", n_sequences=1, journal=disk / "out", threads=1)


def _copy(model: Path, disk: Path) -> None:
    ramgguf.sensitivity(model, tokens="random", n_sequences=1, folder=disk, threads=1)


def _sequences(model: Path, disk: Path) -> None:
    run_eval(model, model, disk / "out")


@pytest.mark.parametrize("use", [_readings, _copy, _sequences])
def test_a_full_disk_is_an_error_in_one_line_and_the_run_goes_on_elsewhere(
    use: Callable[[Path, Path], None], small_disk: Path, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    before = model.read_bytes()
    filler = small_disk / "filler"
    fill_disk(filler, leave=8_000 if use is _sequences else 3_000)
    with pytest.raises((EngineError, PlanError)) as caught:
        use(model, small_disk)
    assert str(caught.value).startswith(str(small_disk))
    assert "\n" not in str(caught.value)
    assert model.read_bytes() == before
    assert not list(small_disk.glob(f"{scratch.PREFIX}*"))
    filler.unlink()
    use(model, small_disk)  # with what is there, and room again


def test_a_full_disk_stops_calibration_in_one_line(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    output, grams = small_disk / "imatrix", tmp_path / "grams"
    filler = small_disk / "filler"

    def run() -> None:
        ramgguf.calibrate(
            model, output, tokens="random", n_sequences=1, n_ctx=64, hessian=grams, threads=1
        )

    fill_disk(filler, leave=0)
    with pytest.raises(ImatrixError, match=r"the disk is full|free and the output needs"):
        run()
    grams.unlink()
    assert list(small_disk.iterdir()) == [filler]
    # The arrays that llama.cpp's process hands over have no room.
    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    fill_disk(filler, leave=9_000)
    with pytest.raises(
        EngineError, match=f"{small_disk}.*: (cannot be written|has .* free, needs)"
    ) as caught:
        run()
    assert str(caught.value).isprintable()
    assert list(small_disk.iterdir()) == [filler]
    assert not grams.exists()
    monkeypatch.undo()
    filler.unlink()
    run()
    assert load_imatrix(output).entries
    assert load_hessians(grams).owners


def test_a_folder_that_may_not_be_written_is_an_error(tmp_path: Path, read_only: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    with pytest.raises(EngineError, match="cannot be made there: Read-only file system"):
        ramgguf.sensitivity(model, folder=read_only, threads=1)
    with pytest.raises(PlanError, match="Read-only file system"):
        ramgguf.sensitivity(model, journal=read_only / "journal", threads=1)
    with pytest.raises(EngineError, match="Read-only file system"):
        run_eval(model, model, read_only / "scores")
    with pytest.raises(GGUFError, match="cannot be written: Read-only file system"):
        ramgguf.quantize(model, "80%", read_only / "out.gguf", formats=["Q8_0"], effort="fast")
    assert not list(read_only.iterdir())


def test_a_model_cut_short_while_it_is_scored_is_named(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", n_layers=8)
    ids = np.arange(3, 67, dtype=np.int32)
    with Engine([model], n_ctx=64, n_threads=1, safe_kernels=True) as engine:
        list(engine.score(0, ids, 1, has_reference=False))
        os.truncate(model, 8192)
        with pytest.raises(CrashError) as caught:
            list(engine.score(1, ids, 1, has_reference=False))
    message = str(caught.value)
    assert message.startswith(f"{model}: llama.cpp crashed in sequence 1: signal SIGBUS (was")
    assert "cut short" in message
    assert "safe-kernels" not in message


class _Disturbing(Silent):
    """Progress that changes a file after the second step."""

    def __init__(self, path: Path) -> None:
        self._path, self._n_steps = path, 0

    def advance(self, amount: int) -> None:
        self._n_steps += 1 if amount else 0
        if self._n_steps == 2:
            os.utime(self._path, ns=(1, 1))


def test_a_source_changed_while_its_sensitivity_is_read_is_an_error(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    journal = tmp_path / "journal"
    with pytest.raises(
        RamggufError, match=r"m\.gguf: the file was changed while it was being read"
    ):
        ramgguf.sensitivity(
            model, tokens="random", n_sequences=1, journal=journal, threads=1,
            progress=_Disturbing(model),
        )  # fmt: skip
    assert 1 < _count_lines(journal) < 5  # the reading of that moment is not kept


@pytest.mark.parametrize("what", ["sensitivity", "refine"])
def test_an_assertion_that_llama_cpp_fails_is_one_line(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Path(__file__).parents[1] / "crashing_runner.py"
    monkeypatch.setattr(session_cache, "_RUNNER_WORKER", (sys.executable, str(worker)))
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    run: Callable[..., object] = partial(ramgguf.sensitivity, model, n_sequences=1, n_ctx=32)
    if what == "refine":
        curves = ramgguf.measure(model, formats=["Q4_0", "Q8_0"], encoder="rtn", threads=1)
        plan = ramgguf.plan(curves, "40%", objective="ram")
        run = partial(ramgguf.refine, model, plan, curves, n_trials=2)
    with pytest.raises(EngineError) as caught:
        run(tokens="random", threads=1)
    message = str(caught.value)
    assert message.startswith(f"{model}: ")
    assert message.endswith(
        "llama.cpp ended with signal SIGABRT (a failed assertion); it said: "
        "ops.cpp:7: GGML_ASSERT(a == b) failed"
    )
    assert "\n" not in message
    assert "worker" not in message


def test_llama_cpp_is_never_loaded_by_a_command_that_runs_passes(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", weight_type="F16")
    program = (
        "import sys, ramgguf\n"
        f"model = {str(model)!r}\n"
        "ramgguf.sensitivity(model, tokens='random', n_sequences=1, n_ctx=32, threads=1)\n"
        "sys.exit('llama_cpp' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_orphaned_scratch_folders_are_removed_and_others_left(tmp_path: Path) -> None:
    orphan = tmp_path / f"{scratch.PREFIX}orphan"
    (orphan / "inner").mkdir(parents=True)
    (orphan / "inner" / "model.gguf").write_bytes(b"copy")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(outside)
    with scratch_folder(tmp_path, error=EngineError) as one:
        assert not orphan.exists()
        with scratch_folder(tmp_path, error=EngineError) as two:
            assert one.is_dir()
            assert two != one
        assert not two.exists()
        assert one.is_dir()
    assert sorted(p.name for p in outside.iterdir()) == ["kept"]
    assert not one.exists()


def test_a_journal_is_read_while_it_grows(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf")
    journal = tmp_path / "journal"
    score_models(
        [model], protocol=EvalProtocol(EXCERPT, n_ctx=64, n_seq=2), threads=1, jsonl=journal
    )
    with open_gguf(model), Journal(journal, resume=True):
        assert len(read_results(journal)) == 1
