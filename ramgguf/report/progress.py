"""Progress with throughput, time left and what comes next: a bar on a terminal, else a line a
minute.

Stages that take less than two seconds, or a minute in a log, show nothing.
"""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from ramgguf.core.units import format_bytes, format_seconds

PATIENCE_SECONDS = 2.0
WIDE = 120  # columns of a terminal, from which on the bar is long
LINE_SECONDS = 60.0  # between the lines of a log


class _Facts(ProgressColumn):
    """How much is done, the rate, the time left and what comes next, cut where a line ends."""

    def __init__(self, upcoming: list[str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._upcoming = upcoming

    def render(self, task: Task) -> Text:
        unit, total = task.fields["unit"], int(task.total or 0)
        if unit == "bytes":
            amount = f"{format_bytes(int(task.completed))} of {format_bytes(total)}"
            rate = f"{format_bytes(int(task.speed or 0))}/s"
        else:
            amount = f"{int(task.completed):,}/{total:,}"
            rate = f"{task.speed or 0:,.0f} {unit}/s"
        facts = [amount, rate if task.speed else f"– {unit}/s"]
        left = task.time_remaining
        facts.append(f"ETA {timedelta(seconds=round(left))}" if left is not None else "ETA –")
        facts += [f"next: {name}" for name in self._upcoming[-1:]]
        return Text(" · ".join(facts))


class Bars:
    """A Progress for terminals and logs; silent while a stage is quick."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: RichProgress | None = None
        self._stage, self._unit = "", ""
        self._total = self._done = 0
        self._started = self._reported = 0.0
        self.upcoming: list[str] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.finish()
        self._stage, self._unit, self._total, self._done = stage, unit, total, 0
        self._started = self._reported = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=self._done)
            return
        now = time.monotonic()
        if not self._console.is_terminal:
            if now - self._reported >= LINE_SECONDS:
                self._reported = now
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
            shown = f"{format_bytes(round(rate))}/s"
        else:
            done, total = f"{self._done:,}", f"{self._total:,} {self._unit}"
            shown = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        then = f", next: {self.upcoming[-1]}" if self.upcoming else ""
        return f"{self._stage}: {done} of {total}, {shown}, {left} left{then}"

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description:<10}", table_column=Column(min_width=10)),
            BarColumn(40 if self._console.width >= WIDE else 12),
            _Facts(self.upcoming),
            console=self._console,
            transient=True,
        )
        self._bar.start()
        self._bar.add_task(self._stage, total=self._total, completed=self._done, unit=self._unit)
