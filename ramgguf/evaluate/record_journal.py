"""A file to which a run writes each record as it is made, and from which it goes on.

One JSON object per line. What the records say together is for the kinds of journals to tell.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from ramgguf.core.closing import Closing
from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.core.inputs import read_bytes
from ramgguf.core.line_file import LineFile, whole_lines

R = TypeVar("R", bound=FrozenModel)


class RecordJournal(Closing, Generic[R]):
    """Records of runs; with a path, also on disk. Use as a context manager.

    records reads their lines, and what names what they are of. Raises EngineError when the file
    exists and resume is False, is no such file, or another process is writing it.
    """

    def __init__(
        self, path: Path | None, records: TypeAdapter[R], what: str, *, resume: bool
    ) -> None:
        self._records, self._what = records, what
        self._file: LineFile | None = None
        if path is None:
            return
        self._file = LineFile.resumed(path, resume=resume, error=EngineError)
        try:
            self._load(path, self._file.lines)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file, if there is one, which frees it for others."""
        if self._file is not None:
            self._file.close()

    def read(self, path: Path) -> Self:
        """Take over the records in a file, which another process may still be writing, and return
        the journal. Raises EngineError if it is no such file.
        """
        self._load(path, whole_lines(read_bytes(path, error=EngineError)))
        return self

    def record(self, record: R) -> None:
        """Take the record over, and write it."""
        self._take(record)
        if self._file is not None:
            self._file.append_record(record)

    @abstractmethod
    def _take(self, record: R) -> None:
        """Take a record over, which is or will be in the file."""

    def _load(self, path: Path, lines: Sequence[bytes]) -> None:
        for number, line in enumerate(lines, start=1):
            try:
                record = self._records.validate_json(line)
            except ValidationError as e:
                raise EngineError(
                    f"{path}: line {number} is no record of {self._what} "
                    f"({e.errors()[0]['msg']}); choose another file"
                ) from None
            self._take(record)
