"""How long-running stages tell what they are doing: a protocol that any front end can fill."""

from typing import Protocol


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
