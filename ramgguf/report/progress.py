"""Progress bars with throughput and time left, for stages that take more than two seconds."""

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

PATIENCE_SECONDS = 2.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else f"– {unit}/s")


class Bars:
    """A Progress for terminals: silent when the console is none, or the stage is quick."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._stage, self._unit = "", ""
        self._total = self._done = 0
        self._started = 0.0

    def start(self, stage: str, total: int, unit: str) -> None:
        self.finish()
        self._stage, self._unit, self._total, self._done = stage, unit, total, 0
        self._started = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=self._done)
        elif self._console.is_terminal and time.monotonic() - self._started > PATIENCE_SECONDS:
            self._show()

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
