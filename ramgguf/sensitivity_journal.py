"""The file to which a sensitivity run writes each reading, and from which it goes on."""

from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import ValidationError

from ramgguf.engine.wire import TokenIds
from ramgguf.errors import PlanError
from ramgguf.line_file import LineFile
from ramgguf.schema import Encoder, ImportanceSource, Source, _Value
from ramgguf.sensitivities import ProbeTokens, Reading


class Settings(_Value):
    """What a run was settled to do: tokens, tensors, and what was promised about its cost."""

    source: Source
    encoder: Encoder
    imatrix: ImportanceSource | None = None
    tokens: ProbeTokens
    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    promise: str
    notes: tuple[str, ...]

    @cached_property
    def sequences(self) -> tuple[TokenIds, ...]:
        """The token ids, one array per sequence."""
        return tuple(np.array(ids, np.int32) for ids in self.ids)


class Journal:
    """Settings and readings, one JSON object per line. Use as a context manager.

    A line that a kill cut short is dropped. Raises PlanError when the file is something else, or
    another process is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.settings: Settings | None = None
        self.readings: dict[str, Reading] = {}
        self._path = path
        self._file = LineFile(path, error=PlanError)
        try:
            self._read(self._file.data)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, settings: Settings) -> None:
        """Record what the run does."""
        self.settings = settings
        self._write(settings)

    def add(self, reading: Reading) -> None:
        """Record a reading."""
        self.readings[reading.name] = reading
        self._write(reading)

    def _write(self, value: _Value) -> None:
        self._file.append(value.model_dump_json().encode())

    def _read(self, data: bytes) -> None:
        whole = data.rfind(b"\n") + 1
        try:
            for number, line in enumerate(data[:whole].splitlines()):
                if number == 0:
                    self.settings = Settings.model_validate_json(line)
                else:
                    reading = Reading.model_validate_json(line)
                    self.readings[reading.name] = reading
        except ValidationError as e:
            raise PlanError(
                f"{self._path}: line {number + 1} is not of a sensitivity run "
                f"({e.errors()[0]['msg']}); remove it or name another output"
            ) from None
        if whole < len(data):
            self._file.keep(whole)
