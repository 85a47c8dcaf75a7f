"""Progress with throughput and time left: a bar on a terminal, else a line a minute.

Stages that take less than two seconds, or a minute in a log, show nothing.
"""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from ramgguf.core.units import format_bytes, format_seconds

PATIENCE_SECONDS = 2.0
LINE_SECONDS = 60.0  # between the lines of a log


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else f"– {unit}/s")


class Bars:
    """A Progress for terminals and logs; silent while a stage is quick."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._stage, self._unit = "", ""
        self._total = self._done = 0
        self._started = self._told = 0.0

    def start(self, stage: str, total: int, unit: str) -> None:
        self.finish()
        self._stage, self._unit, self._total, self._done = stage, unit, total, 0
        self._started = self._told = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=self._done)
            return
        now = time.monotonic()
        if not self._console.is_terminal:
            if now - self._told >= LINE_SECONDS:
                self._told = now
                self._console.print(
                    self._line(now - self._started), highlight=False, soft_wrap=True
                )
        elif now - self._started > PATIENCE_SECONDS:
            self._show()

    def _line(self, seconds: float) -> str:
        """Return how far the stage is after so many seconds, its rate and the time left."""
        rate = self._done / seconds
        left = format_seconds(max(0, self._total - self._done) / rate) if rate else "unknown"
        if self._unit == "bytes":
            done, total = format_bytes(self._done), format_bytes(self._total)
            return f"{self._stage}: {done} of {total}, {format_bytes(round(rate))}/s, {left} left"
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return (
            f"{self._stage}: {self._done:,} of {self._total:,} {self._unit}, "
            f"{shown} {self._unit}/s, {left} left"
        )

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self) -> None:
        amounts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), _Rate())
        if self._unit == "bytes":
            amounts = (DownloadColumn(), TransferSpeedColumn())
        self._bar = RichProgress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            *amounts,
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task(self._stage, total=self._total, completed=self._done, unit=self._unit)
