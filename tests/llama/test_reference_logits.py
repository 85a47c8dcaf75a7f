"""Logits to compare with are kept outside of the process's own memory, within what the disk has."""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from ramgguf.core.errors import EngineError
from ramgguf.core.files import mapped_array
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import local_runner, reference_logits
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.local_runner import LocalRunner
from ramgguf.llama.model import Logits
from ramgguf.llama.reference_logits import ReferenceLogits
from tiny_models import write_tiny_model

SHAPE = (4, 1000)
N_BYTES = 16_000
MANY = """
import sys
from pathlib import Path
from ramgguf.llama.model import Logits
from ramgguf.llama.reference_logits import ReferenceLogits

kept = ReferenceLogits(Path(sys.argv[1]))
for number in range(12):
    kept.add(b"%d" % number, (512, 20_000), lambda out: out.fill(number))
print([float(kept[b"%d" % number][-1, -1]) for number in range(12)])
"""


def _with(folder: Path, n: int, **options: int) -> ReferenceLogits:
    kept = ReferenceLogits(folder, **options)
    for number in range(n):
        kept.add(b"%d" % number, SHAPE, partial(np.copyto, src=number))
    return kept


def test_what_is_kept_is_what_was_written_and_leaves_no_file(tmp_path: Path) -> None:
    kept = _with(tmp_path, 3)
    assert [kept[b"%d" % n].mean() for n in range(3)] == [0, 1, 2]
    assert not list(tmp_path.iterdir())


def test_the_oldest_make_room(tmp_path: Path) -> None:
    kept = _with(tmp_path, 4, most_bytes=2 * N_BYTES)
    assert [b"%d" % n in kept for n in range(4)] == [False, False, True, True]


def test_the_newest_are_kept_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_logits, "free_bytes", lambda _: 0)
    kept = _with(tmp_path, 2)
    assert b"0" not in kept
    assert kept[b"1"].mean() == 1


def test_what_could_not_be_computed_is_not_kept(tmp_path: Path) -> None:
    def failing(_: Logits) -> None:
        raise EngineError("a decode failed")

    kept = ReferenceLogits(tmp_path)
    with pytest.raises(EngineError):
        kept.add(b"0", SHAPE, failing)
    assert b"0" not in kept


def test_they_are_no_memory_of_the_process(tmp_path: Path) -> None:
    limit = 400 << 20  # the logits take 491 MB

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-c", MANY, str(tmp_path)]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([float(n) for n in range(12)]), done.stderr


def test_passes_keep_them_in_the_folder_of_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    folder = tmp_path / "folder"
    folder.mkdir()
    made: list[Path] = []

    def recorded(where: Path, *arguments: Any, **options: Any) -> Any:
        array = mapped_array(where, *arguments, **options)
        made.append(where)
        return array

    monkeypatch.setattr(reference_logits, "mapped_array", recorded)
    with (
        open_gguf(path) as file,
        LocalRunner(file, folder, n_ctx=64, threads=1, encoder="search", imatrix=None) as runner,
    ):
        runner.prepare([np.arange(32, dtype=np.int32)])
        assert not list(folder.iterdir())
    assert made == [folder]


def test_an_array_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no array can be kept there"):
        mapped_array(tmp_path, (1 << 50,), np.float32, error=EngineError)


def test_logits_that_were_given_up_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    sequences = [np.random.default_rng(k).integers(0, 256, 32).astype(np.int32) for k in range(3)]
    change = ("blk.0.attn_v.weight", "Q4_0")
    requests = [ForwardRequest((change,), (ids,)) for ids in [*sequences, *sequences]]

    def found() -> list[float]:
        with (
            open_gguf(path) as file,
            LocalRunner(
                file, tmp_path, n_ctx=64, threads=1, encoder="search", imatrix=None
            ) as runner,
        ):
            return [float(one.kld.sum()) for _, one in runner.run(requests)]

    all_kept = found()
    monkeypatch.setattr(
        local_runner, "ReferenceLogits", lambda folder: ReferenceLogits(folder, most_bytes=1)
    )
    assert found() == all_kept
    assert min(all_kept) > 0
