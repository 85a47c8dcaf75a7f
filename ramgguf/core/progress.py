"""Progress of long stages: a protocol that any front end implements."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable


class Progress(Protocol):
    """A stage calls start once, advance as work is done, and finish once, also after an error."""

    def start(self, stage: str, total: int, unit: str) -> None: ...
    def advance(self, amount: int) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """Progress that shows nothing."""

    def start(self, stage: str, total: int, unit: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass


@runtime_checkable
class Foresees(Protocol):
    """Progress that shows what comes after the stage under way, too: the last of upcoming."""

    upcoming: list[str]


@contextmanager
def followed_by(progress: Progress, stage: str) -> Iterator[None]:
    """While this lasts, `stage` is what comes next, where the progress shows that."""
    if not isinstance(progress, Foresees):
        yield
        return
    progress.upcoming.append(stage)
    try:
        yield
    finally:
        progress.upcoming.pop()


class Clock:
    """Collects the seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
