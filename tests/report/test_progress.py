"""Progress in a log: a line a minute, with the rate and the time left."""

import io
import re
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ramgguf.cli.app import app
from ramgguf.core.errors import EngineError
from ramgguf.core.progress import Silent, followed_by
from ramgguf.report import progress
from ramgguf.report.progress import Bars
from tiny_models import write_tiny_model


class Seconds:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    found = Seconds()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_a_log_gets_a_line_a_minute_with_rate_and_time_left(clock: Seconds) -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out, width=40))
    bars.start("calibrate", 24_000, "tokens")
    for _ in range(130):  # 40 tokens a second for 130 s
        clock.now += 1
        bars.advance(40)
    bars.finish()
    assert out.getvalue().splitlines() == [
        "calibrate: 2,400 of 24,000 tokens, 40 tokens/s, 9 min 0 s left",
        "calibrate: 4,800 of 24,000 tokens, 40 tokens/s, 8 min 0 s left",
    ]


def test_each_stage_of_a_log_has_minutes_of_its_own_and_units_as_they_are_read(
    clock: Seconds,
) -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out))
    bars.start("measure", 10**9, "bytes")
    clock.now += 59
    bars.advance(10**8)
    bars.start("sensitivity", 170, "passes")  # the minute begins anew
    clock.now += 59
    bars.advance(1)
    assert out.getvalue() == ""
    clock.now += 1
    bars.advance(2)
    assert out.getvalue() == "sensitivity: 3 of 170 passes, 0.05 passes/s, 55 min 40 s left\n"
    bars.start("measure", 10**9, "bytes")
    clock.now += 100
    bars.advance(10**8)
    assert (
        out.getvalue().splitlines()[1] == "measure: 100 MB of 1.00 GB, 1.00 MB/s, 15 min 0 s left"
    )


def test_a_stage_that_has_done_nothing_yet_says_no_time(clock: Seconds) -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out))
    bars.start("calibrate", 100, "tokens")
    clock.now += 61
    bars.advance(0)
    assert out.getvalue() == "calibrate: 0 of 100 tokens, 0 tokens/s, unknown left\n"


def test_a_terminal_gets_a_bar_and_no_lines(clock: Seconds) -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out, force_terminal=True, color_system=None, width=100))
    bars.start("calibrate", 100, "tokens")
    clock.now += 61
    bars.advance(50)
    bars.finish()
    assert "left" not in out.getvalue()
    assert re.search(r"calibrate .* 50/100 · .+ tokens/s · ETA \S+", out.getvalue())
    assert "next" not in out.getvalue()


def test_a_bar_and_a_log_say_what_comes_next(clock: Seconds) -> None:
    for is_terminal in (True, False):
        out = io.StringIO()
        bars = Bars(Console(file=out, force_terminal=is_terminal, color_system=None, width=80))
        with followed_by(bars, "error feedback"):
            with followed_by(bars, "gate"), suppress(EngineError):
                raise EngineError("what was to come next is forgotten then, too")
            bars.start("calibrate", 100, "tokens")
            clock.now += 61
            bars.advance(50)
        bars.finish()
        text = out.getvalue()
        assert ("· next: error feedback" if is_terminal else "left, next: error feedback") in text
        assert "gate" not in text
        assert bars.upcoming == []
    with followed_by(Silent(), "nothing is shown"):
        pass


@pytest.mark.parametrize(
    ("command", "stage", "unit"),
    [
        (("calibrate", "--tokens", "self"), "calibrate", "tokens"),
        (("calibrate", "--tokens", "random"), "draw tokens", "tokens"),
        (("calibrate", "--tokens", "random"), "calibrate", "tokens"),
        (("sensitivity",), "sensitivity", "passes"),
    ],
)
def test_the_passes_of_a_command_write_lines_to_a_log_unless_quiet(
    command: tuple[str, ...],
    stage: str,
    unit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    model = write_tiny_model(tmp_path / "tiny.gguf")
    options = ["-o", str(tmp_path / "out"), "--sequences", "2", "--context", "16", "-t", "1"]
    name, *more = command
    asked = [name, str(model), *more, *options]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    line = rf"{stage}: [\d,]+ of [\d,]+ {unit}, [\d.,e+]+ {unit}/s, .+ left"
    assert any(re.fullmatch(line, text) for text in done.stderr.splitlines()), done.stderr
    quiet = CliRunner().invoke(app, [*asked, "--force", "-q"])
    assert quiet.exit_code == 0
    assert quiet.stderr == ""
