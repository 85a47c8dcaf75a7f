"""Files of lines: what a kill cut short is overwritten, and nothing else ever is."""

from pathlib import Path

import pytest

from ramgguf.core.errors import PlanError
from ramgguf.core.line_file import LineFile


def _append(path: Path, *lines: bytes) -> list[bytes]:
    """Add the lines; return those that were there."""
    file = LineFile(path, error=PlanError)
    try:
        for line in lines:
            file.append(line)
        return file.lines
    finally:
        file.close()


def test_lines_are_those_that_were_added(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert _append(path, b'{"a": 1}', b"{}") == []
    assert _append(path, b"{2}") == [b'{"a": 1}', b"{}"]
    assert path.read_bytes() == b'{"a": 1}\n{}\n{2}\n'


def test_a_line_cut_short_is_overwritten_by_the_next_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for cut in (b"{", b'{"a": "much longer than what comes next"}'):
        path.write_bytes(b"{1}\n" + cut)
        assert _append(path) == [b"{1}"]
        assert path.read_bytes() == b"{1}\n" + cut
        assert _append(path, b"{2}", b"{3}") == [b"{1}"]
        assert path.read_bytes() == b"{1}\n{2}\n{3}\n"


@pytest.mark.parametrize("content", [b"a letter", b"{1}\nand more", b"\x00" * 100])
def test_what_is_no_line_of_json_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"lines: ends in what is no line of JSON"):
        _append(path, b"{2}")
    assert path.read_bytes() == content
