"""Looking up metadata costs what the value that is wanted costs, whatever the key holds."""

import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gguf_samples
from gguf_samples import ARCHITECTURE, ARRAY, SOUND, STRING, U32, File, Key, Tensor
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError
from ramgguf.gguf.architecture import layer_of, role_of
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import open_gguf

N = 2_000_000  # strings of no length: 16 MB
HUGE = gguf_samples.array(STRING, N, bytes(8 * N))


def _file(*keys: Key, name: str = "llama", **options: Any) -> bytes:
    architecture = Key("general.architecture", STRING, gguf_samples.text(name))
    return File(keys=(architecture, *keys), **options).bytes()


@pytest.mark.parametrize(
    "key", ["general.name", "general.license", "ramgguf.version", "llama.context_length"]
)
def test_an_array_in_place_of_a_scalar_is_not_decoded(key: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_file(Key(key, ARRAY, HUGE)))
    tracemalloc.start()
    start = time.process_time()
    try:
        done = CliRunner().invoke(app, ["card", str(path)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert done.exit_code == 0, done.output
    assert peak < 2 * len(HUGE) + 32_000_000  # the header as it is read; decoded it takes 10 times
    assert time.process_time() - start < 2


def test_every_lookup_looks_at_the_type_first(tmp_path: Path) -> None:
    keys = [Key("s", ARRAY, HUGE), Key("n", U32, struct.pack("<I", 7))]
    keys += [Key("t", STRING, gguf_samples.text("é" * 5000))]
    path = tmp_path / "m.gguf"
    path.write_bytes(_file(*keys))
    with open_gguf(path) as file:
        metadata = file.metadata
        start = time.process_time()
        for lookup in (metadata.integer, metadata.string, metadata.flag, metadata.numbers):
            assert lookup("s") is None
            assert lookup("missing") is None
        assert metadata.strings("s", 3) == ("", "", "")
        assert time.process_time() - start < 0.2
        assert metadata.integer("n") == 7
        assert metadata.string("n") is None
        assert metadata.strings("n") is None
        assert metadata.string("t") == "é" * 5000
        assert metadata.string("t", 10) == "é" * 10


def test_a_name_of_megabytes_is_shown_by_how_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_file(Key("general.name", STRING, gguf_samples.text("ab" * 4_000_000))))
    done = CliRunner().invoke(app, ["card", str(path)])
    assert done.exit_code == 0
    assert len(done.output) < 10_000


def test_padding_of_2_gib_is_never_made(tmp_path: Path) -> None:
    alignment = 1 << 31
    keys = (ARCHITECTURE, Key("general.alignment", U32, struct.pack("<I", alignment)))
    tensors = [Tensor("a.weight", (8,), 0, 0), Tensor("b.weight", (8,), 0, alignment)]
    header = File(keys=keys, tensors=tensors).header()
    path = tmp_path / "m.gguf"
    with path.open("wb") as out:
        out.write(header)
        out.truncate(2 * alignment + 32)  # a hole
    with open_gguf(path) as source:
        layout = plan_layout(tmp_path / "o.gguf", source, {}, {})
        assert layout.header_bytes == alignment
        assert layout.n_bytes == 3 * alignment
        assert sum(len(s.header) for s in layout.shards) < 1000


_WRITE = """
import resource, sys
from pathlib import Path
from ramgguf.core import files
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.writer import GGUFOutput

files._fallocate = lambda *_: None  # three times the alignment, as a hole
files.require_disk_space.__globals__["free_bytes"] = lambda _: 1 << 62
limit = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (128 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
folder = Path(sys.argv[1])
with open_gguf(folder / "m.gguf") as source:
    with GGUFOutput(plan_layout(folder / "o.gguf", source, {}, {}), source, force=False) as out:
        pieces = [(t.name, 0, source.read_rows(t, 0, 1)) for t in source.tensors]
        out.write_pieces(pieces)
        out.commit()
with open_gguf(folder / "o.gguf") as made, open_gguf(folder / "m.gguf") as source:
    for tensor in source.tensors:
        written = made.read_rows(made.tensor(tensor.name), 0, 1)
        assert (written == source.read_rows(tensor, 0, 1)).all()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_file_with_padding_of_half_a_gib_is_written_in_little_memory(tmp_path: Path) -> None:
    alignment = 1 << 29
    keys = (ARCHITECTURE, Key("general.alignment", U32, struct.pack("<I", alignment)))
    tensors = [Tensor("a.weight", (8,), 0, 0), Tensor("b.weight", (8,), 0, alignment)]
    with (tmp_path / "m.gguf").open("wb") as out:
        out.write(File(keys=keys, tensors=tensors).header())
        for place in (alignment, 2 * alignment):
            out.seek(place)
            out.write(bytes(range(32)))
    done = subprocess.run(
        [sys.executable, "-c", _WRITE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_rows_longer_than_any_models_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    length = 1 << 31
    header = File(
        keys=SOUND.keys, tensors=[Tensor("blk.0.ffn_up.weight", (length, 2), 1, 0)]
    ).header()
    with path.open("wb") as out:
        out.write(header)
        out.truncate(len(header) + 31 + 4 * length)  # a hole
    with open_gguf(path) as file:  # the header may be looked at
        assert file.tensors[0].row_length == length
    with pytest.raises(GGUFError, match=rf"ffn_up.*rows of {length} weights; at most"):
        open_gguf(path, kind_check=True)
    for command in ("measure", "quantize"):
        size = ["-b", "50%"] if command == "quantize" else []
        done = CliRunner().invoke(app, [command, str(path), *size, "-o", str(tmp_path / "o")])
        assert "at most" in str(done.exception)
    assert CliRunner().invoke(app, ["recipe", str(path)]).exit_code == 0


@pytest.mark.parametrize("number", ["9007199254740993", "9" * 40, "٣"])
def test_a_layer_number_that_no_model_has_is_part_of_an_unknown_name(
    number: str, tmp_path: Path
) -> None:
    name = f"blk.{number}.ffn_up.weight"
    assert layer_of(name) is None
    assert role_of(name) == "other"
    path = tmp_path / "m.gguf"
    path.write_bytes(File(tensors=[Tensor(name, (32, 3), 1, 0)], data=bytes(192)).bytes())
    curves, plan = tmp_path / "m.json", tmp_path / "p.json"
    for command in (
        ["measure", path, "-o", curves],
        ["plan", curves, "-b", "4kB", "--min-sqnr", "0", "-o", plan],
        ["recipe", path],
        ["card", path],
        ["quantize", path, "-b", "4kB", "--min-sqnr", "0", "-o", tmp_path / "q.gguf"],
    ):
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, (command, done.output, done.exception)


def test_a_number_of_layers_that_no_model_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_file(Key("llama.block_count", U32, struct.pack("<I", 2**32 - 1))))
    with open_gguf(path) as file, pytest.raises(GGUFError, match="block_count is 4294967295"):
        _ = file.n_layers
