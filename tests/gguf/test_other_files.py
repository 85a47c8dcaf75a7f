"""Files and names that are no GGUF file: the message says what it is and what to do."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.gguf.shards import model_stem
from tiny_models import write_tiny_model

CASES = {
    "lfs.gguf": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page.gguf": (b"<!DOCTYPE html><html>", "is a web page; download"),
    "xml.gguf": (b'<?xml version="1.0"?><Error>', "is a web page; download"),
    "m.safetensors": (b'\x10\0\0\0\0\0\0\0{"__metadata__":{}}', "name the folder of"),
    "pytorch_model.bin": (b"PK\x03\x04 and so on", "as safetensors"),
    "old.bin": (b"\x80\x02}q\x00", "as safetensors"),
    "ggml.bin": (b"ggjt" + bytes(64), "is a model of before GGUF"),
    "list.json": (b"[1, 2, 3, 4, 5, 6, 7, 8]", "is JSON; name a GGUF file"),
    "folder": (None, "is a folder; name a file in it: m.gguf"),
    "checkpoint": (None, "and no config.json"),
    "empty": (None, "is a folder with neither a .gguf file"),
    "org/repo": (None, "write hf://org/repo"),
    "https://huggingface.co/o/r": (None, "an address, not a file; write hf://o/r"),
    "https://huggingface.co/o/r/resolve/main/q/x.gguf?download=true": (
        None, "write hf://o/r/q/x.gguf"
    ),
    "https://huggingface.co/o/r/blob/v2/x.gguf": (None, "write hf://o/r@v2/x.gguf"),
    "https://example.com/x.gguf": (None, "is an address, not a file; download it"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["recipe", "measure", "card", "diff", "quantize"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_no_gguf_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, expected = CASES[name]
    if content is not None:
        Path(name).write_bytes(content)
    for folder, inside in (("folder", "m.gguf"), ("checkpoint", "a.safetensors"), ("empty", "")):
        Path(folder).mkdir()
        if inside:
            Path(folder, inside).write_bytes(b"GGUF")
    more = [name] if command == "diff" else ["-o", "out"]
    more += ["-b", "50%"] if command == "quantize" else []
    done = CliRunner().invoke(app, [command, name, *more])
    assert done.exit_code == 1
    assert expected in str(done.exception)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("model-f16-00001-of-00003.gguf", "model-f16"),
        ("Model.GGUF", "Model"),
        ("Model-00002-of-00003.GGUF", "Model"),
        ("m.v1.gguf", "m.v1"),
        ("plain", "plain"),
    ],
)
def test_a_new_name_has_neither_the_number_of_a_shard_nor_the_ending(name: str, stem: str) -> None:
    assert model_stem(Path(name)) == stem


def test_what_is_made_from_a_shard_is_named_after_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_tiny_model(Path("m-f32.gguf"))
    shards = ramgguf.quantize(
        source, "90%", Path("s.GGUF"), min_sqnr_db=0, split_max_bytes=200_000, threads=1
    ).paths
    assert [p.name for p in shards] == [
        f"s-{i + 1:05d}-of-{len(shards):05d}.gguf" for i in range(len(shards))
    ]
    assert len(shards) > 1
    done = CliRunner().invoke(app, ["measure", str(shards[0]), "--allow-requantize"])
    assert done.exit_code == 0, done.exception
    assert Path("s.rd.json").exists()


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    from ramgguf.core.corpus import text_file

    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfwords")
    assert text_file(path).text == "words"


def test_a_checkpoint_in_the_current_folder_has_the_folder_s_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "SmolLM2").mkdir()
    monkeypatch.chdir(tmp_path / "SmolLM2")
    assert model_stem(Path()) == "SmolLM2"
