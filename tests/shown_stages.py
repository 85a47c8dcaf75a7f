"""Progress that a test can ask what it was told."""

from ramgguf.core.progress import Silent


class ShownStages(Silent):
    """Keeps each stage with what comes after it, the next one first."""

    def __init__(self) -> None:
        self.upcoming: list[str] = []
        self.stages: list[tuple[str, ...]] = []

    def start(self, stage: str, total: int, unit: str) -> None:
        self.stages.append((stage, *reversed(self.upcoming)))
