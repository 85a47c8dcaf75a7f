"""The file to which evaluations and trajectories write as they go on."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.evaluate.record_journal import RecordJournal

HIDDEN = "a\u202eb\u200b"


class Note(FrozenModel):
    """A record that is a text."""

    text: str


class Notes(RecordJournal[Note]):
    """Notes in their order."""

    def __init__(self, path: Path | None, *, resume: bool = True) -> None:
        self.texts: list[str] = []
        super().__init__(path, TypeAdapter(Note), "notes", resume=resume)

    def _take(self, record: Note) -> None:
        self.texts.append(record.text)


def test_a_run_goes_on_with_the_records_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    with Notes(path, resume=False) as first:
        first.record(Note(text="one"))
    with Notes(path) as second:
        second.record(Note(text="two"))
        assert second.texts == ["one", "two"]
        assert Notes(None).read(path).texts == ["one", "two"]
    assert len(path.read_bytes().splitlines()) == 2


def test_what_could_hide_or_turn_the_text_is_an_escape_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    with Notes(path) as written:
        written.record(Note(text=HIDDEN))
    assert path.read_bytes().isascii()
    assert Notes(None).read(path).texts == [HIDDEN]


def test_without_a_path_records_are_kept_in_memory_alone() -> None:
    with Notes(None) as notes:
        notes.record(Note(text="one"))
    assert notes.texts == ["one"]


def test_a_line_of_something_else_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one"}\n{"other": 1}\n')
    with pytest.raises(EngineError, match="line 2 is no record of notes"):
        Notes(path)
    Path(path).write_text('{"text": "one"}\n')
    with Notes(path) as free:  # the one that was refused has let the file go
        assert free.texts == ["one"]


def test_a_file_that_is_there_is_kept_unless_the_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "one"}\n')
    with pytest.raises(EngineError, match="--resume"):
        Notes(path, resume=False)
    assert path.read_text() == '{"text": "one"}\n'
