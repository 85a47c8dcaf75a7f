"""A file with a long run's settings and finished steps; a killed run continues from it.

One JSON object per line: the settings first, then the steps.
"""

from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from ramgguf.core.closing import Closing
from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import PlanError
from ramgguf.core.line_file import LineFile

S = TypeVar("S", bound=FrozenModel)
T = TypeVar("T", bound=FrozenModel)


class LineJournal(Closing, Generic[S, T]):
    """Settings and steps of a run of this kind. Use as a context manager.

    step is the type of steps, or a union of types that differ in their fields.
    Raises PlanError when the file is something else, or another process is writing it.
    """

    def __init__(self, path: Path, settings: type[S], step: Any, kind: str) -> None:
        self.settings: S | None = None
        self.steps: list[T] = []
        self._path, self._kind = path, kind
        self._settings_type = settings
        self._step: TypeAdapter[T] = TypeAdapter(step)
        self._file = LineFile(path, error=PlanError)
        try:
            self._read(self._file.lines)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file, which frees it for others."""
        self._file.close()

    def begin(self, settings: S) -> None:
        """Record what the run does; what another one has left is forgotten."""
        if self.settings is not None:
            self._file.clear()
            self.steps = []
        self.settings = settings
        self._file.append_record(settings)

    def add(self, step: T) -> None:
        """Record a step."""
        self.steps.append(step)
        self._file.append_record(step)

    def _read(self, lines: list[bytes]) -> None:
        try:
            for number, line in enumerate(lines):
                if number == 0:
                    self.settings = self._settings_type.model_validate_json(line)
                else:
                    self.steps.append(self._step.validate_json(line))
        except ValidationError as e:
            raise PlanError(
                f"{self._path}: line {number + 1} is not of a {self._kind} run "
                f"({e.errors()[0]['msg']}); remove it or name another output"
            ) from None
