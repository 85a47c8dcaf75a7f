"""Error feedback that is killed goes on with the rows that it had not rounded."""

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ramgguf
from ramgguf.core import parallel
from ramgguf.quantize.kept_blocks import KeptBlocks
from ramgguf.quantize.pipeline import QuantizeOptions, quantize_once
from ramgguf.quants import codec
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")


class KilledError(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    model = write_tiny_model(folder / "tiny-f16.gguf", weight_type="F16")
    ramgguf.calibrate(
        model, folder / "i.gguf", tokens="random", n_sequences=2, n_ctx=64,
        hessian=folder / "h.gguf", threads=1,
    )  # fmt: skip
    return model


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CHUNK_WEIGHTS", 4096)
    monkeypatch.setattr(parallel, "BATCH_RUNS", 1)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the pieces that are encoded while a file is written."""
    counts: list[int] = []
    encode = codec.encode

    def counted(pieces: Any, *args: Any) -> None:
        counts.append(len(pieces))
        encode(pieces, *args)

    monkeypatch.setattr(codec, "encode", counted)
    return counts


def _made(model: Path, output: Path, kept: Path | None, budget: str = "60%") -> Path:
    options = QuantizeOptions(
        "gptq", model.with_name("i.gguf"), model.with_name("h.gguf"), kept_blocks=kept, threads=1,
        plan={"min_sqnr_db": 0},
    )  # fmt: skip
    return quantize_once(model, budget, output, options).paths[0]


def _killed_after(
    n: int, model: Path, output: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, added = KeptBlocks.add, []

    def add_and_end(self: KeptBlocks, *args: Any) -> None:
        add(self, *args)
        added.append(args)
        if len(added) == n:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(KeptBlocks, "add", add_and_end)
        with pytest.raises(KilledError):
            _made(model, output, kept)
    assert not output.exists()


def test_a_killed_sweep_goes_on_and_writes_the_same_bytes(
    tiny: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _made(tiny, tmp_path / "whole.gguf", None)
    every = sum(encoded)
    encoded.clear()
    kept = tmp_path / "kept"
    _killed_after(5, tiny, tmp_path / "out.gguf", kept, monkeypatch)
    before = sum(encoded)
    with kept.open("ab") as file:
        file.write(b'\x40\0\0\0\0\0\0\0{"squares": [[1')  # cut short
    encoded.clear()
    again = _made(tiny, tmp_path / "out.gguf", kept)
    assert again.read_bytes() == whole.read_bytes()
    assert 0 < before < every
    assert sum(encoded) == every - before
    encoded.clear()
    third = _made(tiny, tmp_path / "third.gguf", kept)  # all of it is there
    assert third.read_bytes() == whole.read_bytes()
    assert sum(encoded) == 0


def test_what_is_damaged_is_encoded_again(
    tiny: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _made(tiny, tmp_path / "whole.gguf", None)
    kept = tmp_path / "kept"
    _killed_after(6, tiny, tmp_path / "out.gguf", kept, monkeypatch)
    data = bytearray(kept.read_bytes())
    data[-100] ^= 1
    kept.write_bytes(data)
    assert _made(tiny, tmp_path / "out.gguf", kept).read_bytes() == whole.read_bytes()


def test_another_plan_begins_anew(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _made(tiny, tmp_path / "whole.gguf", None, "70%")
    kept = tmp_path / "kept"
    _killed_after(5, tiny, tmp_path / "out.gguf", kept, monkeypatch)
    again = _made(tiny, tmp_path / "out.gguf", kept, "70%")
    assert again.read_bytes() == whole.read_bytes()


def test_a_file_in_use_or_a_full_disk_keeps_nothing_and_ends_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    whole = _made(tiny, tmp_path / "whole.gguf", None)
    kept = tmp_path / "kept"
    with KeptBlocks(kept, "another run") as other:
        assert list(other.begun()) == []
        size = kept.stat().st_size
        assert _made(tiny, tmp_path / "a.gguf", kept).read_bytes() == whole.read_bytes()
        assert kept.stat().st_size == size
    full = Path("/dev/full")
    if full.exists():
        assert _made(tiny, tmp_path / "b.gguf", full).read_bytes() == whole.read_bytes()


class _Full(io.FileIO):
    """A file on a full disk."""

    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_was_kept_gives_its_room_back_once_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    with KeptBlocks(path, "a sweep") as kept:
        assert list(kept.begun()) == []
        kept.add(((0, 1.0, 2.0),), (np.ones((2, 8), np.uint8),))
        assert path.stat().st_size > 16
        kept.close()
        kept._file = _Full(path, "r+b")
        kept.add(((0, 1.0, 2.0),), (np.ones((2, 8), np.uint8),))
        assert not kept.is_kept
    assert path.stat().st_size == 0
