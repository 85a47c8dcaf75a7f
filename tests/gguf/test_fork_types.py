"""Types of ik_llama.cpp: named, counted, and refused only where their data are needed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gguf_samples import SOUND_KEYS, File, Tensor
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError
from ramgguf.gguf.fork_types import FORK_TYPES
from ramgguf.gguf.header import GGML_TYPES
from ramgguf.gguf.reader import open_gguf

IQ4_K, IQ4_KS = FORK_TYPES[139], FORK_TYPES[144]


def _write(path: Path, *types: int) -> Path:
    """Write a model with a tensor of 3 rows of 512 weights in each of the types."""
    tensors, offset = [], 0
    for i, number in enumerate(types):
        kind = FORK_TYPES[number]
        tensors.append(Tensor(f"blk.{i}.ffn_up.weight", (512, 3), number, offset))
        n_bytes = 3 * (512 // kind.block_weights * kind.block_bytes + kind.row_bytes)
        offset += -(-n_bytes // 32) * 32
    path.write_bytes(File(keys=SOUND_KEYS, tensors=tensors, data=bytes(offset)).bytes())
    return path


def test_every_type_of_the_fork_has_its_name_and_size(tmp_path: Path) -> None:
    with open_gguf(_write(tmp_path / "m.gguf", *FORK_TYPES)) as file:
        for tensor, kind in zip(file.tensors, FORK_TYPES.values(), strict=True):
            assert tensor.type_name == kind.name
            blocks = 3 * 512 // kind.block_weights
            assert tensor.n_bytes == blocks * kind.block_bytes + 3 * kind.row_bytes
    assert (IQ4_K.name, IQ4_KS.name, IQ4_KS.row_bytes) == ("IQ4_K", "IQ4_KS", 4)
    assert not {t.id for t in GGML_TYPES.values()} & FORK_TYPES.keys()
    assert not GGML_TYPES.keys() & {t.name for t in FORK_TYPES.values()}


def test_rows_that_bring_bytes_of_their_own_cannot_overflow(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(File(tensors=[Tensor("t", (32, 2**58 - 1), 151, 0)]).bytes())
    with pytest.raises(GGUFError, match="size in bytes that overflows"):
        open_gguf(path)
    path.write_bytes(File(tensors=[Tensor("t", (256, 10), 144, 0)], data=bytes(1399)).bytes())
    with pytest.raises(GGUFError, match="its 1400 bytes"):
        open_gguf(path)


def test_what_needs_no_data_goes_on(tmp_path: Path) -> None:
    one = _write(tmp_path / "one.gguf", 139, 144)
    two = _write(tmp_path / "two.gguf", 140, 144)
    run = CliRunner().invoke
    found = json.loads(run(app, ["diff", str(one), str(two), "--json"]).stdout)
    assert found["same"] == 1
    assert [(c["a"], c["b"]) for c in found["changes"]] == [("IQ4_K", "IQ5_K")]
    recipe = json.loads(run(app, ["recipe", str(one), "--json"]).stdout)
    assert [t["format"] for t in recipe["tensors"]] == ["IQ4_K", "IQ4_KS"]
    assert "IQ4\\_KS" in run(app, ["card", str(one)]).stdout


@pytest.mark.parametrize("command", ["measure", "quantize", "check", "eval", "calibrate"])
def test_what_needs_the_data_names_the_type_and_the_fork(tmp_path: Path, command: str) -> None:
    path = _write(tmp_path / "m.gguf", 139)
    text = tmp_path / "t.txt"
    text.write_text("words " * 2000)
    options = {
        "quantize": ["-b", "50%", "-o", str(tmp_path / "o.gguf")],
        "eval": ["--text", str(text)],
        "measure": ["-o", str(tmp_path / "o.json")],
    }
    done = CliRunner().invoke(app, [command, str(path), *options.get(command, [])])
    assert isinstance(done.exception, GGUFError), (done.output, done.exception)
    assert "ik_llama.cpp (IQ4_K)" in str(done.exception)


def test_a_type_of_nobody_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(File(tensors=[Tensor("t", (32,), 36, 0)]).bytes())
    with pytest.raises(GGUFError, match="unknown type 36"):
        open_gguf(path)
