"""GGUF files read: gguf.GGUFReader is the oracle."""

import os
import re
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType

import gguf_samples
from gguf_samples import SOUND, SOUND_DATA_BYTES, File, Hostile, Key, Tensor
from ramgguf import _core
from ramgguf.core.errors import GGUFError
from ramgguf.gguf import shards as gguf_shard
from ramgguf.gguf.header import GGML_TYPES, ValueType
from ramgguf.gguf.reader import GGUFFile, open_gguf, require_language_model


def _write(folder: Path, content: bytes, name: str = "file.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return gguf_samples.write_model(tmp_path / "small.gguf", rng=np.random.default_rng(1))


def _assert_same_as_reader(path: Path) -> None:
    """Compare every field and every tensor with what gguf.GGUFReader says."""
    reader = GGUFReader(path)
    with open_gguf(path) as file:
        fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        assert file.version == reader.fields["GGUF.version"].contents()
        assert file.alignment == reader.alignment
        for key, field in fields.items():
            assert file.kv_types[key] == field.types[0]
            found, expected = file.metadata[key], field.contents()
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, np.array(expected, found.dtype), err_msg=key)
            elif isinstance(found, tuple):
                assert list(found) == expected, key
            else:
                assert found == expected, key
        assert [t.name for t in file.tensors] == [t.name for t in reader.tensors]
        for mine, theirs in zip(file.tensors, reader.tensors, strict=True):
            assert mine.shape == tuple(theirs.shape)
            assert mine.type_id == theirs.tensor_type
            assert mine.type_name == theirs.tensor_type.name
            assert (mine.n_weights, mine.n_bytes) == (theirs.n_elements, theirs.n_bytes)
            assert mine.offset == theirs.data_offset
            data = theirs.data.view(np.uint8).reshape(mine.n_rows, mine.row_bytes)
            assert np.array_equal(file.read_rows(mine, 0, mine.n_rows), data), mine.name


def test_a_small_model_reads_as_gguf_reader_reads_it(small: Path) -> None:
    _assert_same_as_reader(small)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_any_alignment_reads_as_gguf_reader_reads_it(tmp_path: Path, alignment: int) -> None:
    rng = np.random.default_rng(2)
    path = tmp_path / "aligned.gguf"
    _assert_same_as_reader(gguf_samples.write_model(path, rng=rng, alignment=alignment))


@pytest.mark.real
def test_a_real_model_reads_as_gguf_reader_reads_it(smol768: Path) -> None:
    _assert_same_as_reader(smol768)


def test_every_value_type_is_decoded(tmp_path: Path) -> None:
    with open_gguf(_write(tmp_path, SOUND.bytes())) as file:
        values = {k: v for k, v in file.metadata.items() if not isinstance(v, np.ndarray)}
        assert values == {
            "general.architecture": "llama",
            "general.name": "tiny",
            "llama.block_count": 2,
            "tiny.u8": 7,
            "tiny.i8": -1,
            "tiny.u16": 513,
            "tiny.i16": -2,
            "tiny.i32": -3,
            "tiny.f32": 0.5,
            "tiny.bool": True,
            "tiny.u64": 2**40,
            "tiny.i64": -(2**40),
            "tiny.f64": 0.1,
            "tiny.tokens": ("a", "é", "\\xff\\xfe"),
        }
        np.testing.assert_array_equal(file.metadata["tiny.scores"], [1.0, 2.0, 3.0])
        np.testing.assert_array_equal(file.metadata["tiny.flags"], [False, True])
        assert np.asarray(file.metadata["tiny.empty"]).shape == (0,)
        assert (file.architecture, file.name, file.n_layers) == ("llama", "tiny", 2)
        assert file.n_weights == 96 + 8 + 24


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    with (
        open_gguf(_write(tmp_path, File(version=2).bytes(), "2.gguf")) as two,
        open_gguf(_write(tmp_path, SOUND.bytes(), "3.gguf")) as three,
    ):
        assert (two.version, three.version) == (2, 3)
        assert two.tensors == three.tensors
        assert two.header_sha256 != three.header_sha256


def test_the_type_table_is_that_of_gguf() -> None:
    table = {t.id: (t.block_weights, t.block_bytes) for t in GGML_TYPES.values()}
    known = {int(k): v for k, v in GGML_QUANT_SIZES.items()}
    assert known.items() <= table.items()
    # ggml has formats that its Python package does not know yet.
    ours = {f.type_id: (f.block_size, f.block_bytes) for f in _core.formats()}
    assert {k: v for k, v in table.items() if k not in known}.items() <= ours.items()
    assert {int(t): t.name for t in ValueType} == {int(t): t.name for t in GGUFValueType}


def test_a_vocabulary_of_262144_tokens_opens_in_50_ms(tmp_path: Path) -> None:
    n = 262_144
    strings, array = gguf_samples.text, gguf_samples.array
    tokens = b"".join(strings(f"▁token{i}") for i in range(n))
    merges = b"".join(strings(f"▁tok en{i}") for i in range(n))
    keys = (
        gguf_samples.ARCHITECTURE,
        Key("tokenizer.ggml.tokens", gguf_samples.ARRAY, array(gguf_samples.STRING, n, tokens)),
        Key("tokenizer.ggml.scores", gguf_samples.ARRAY, array(gguf_samples.F32, n, bytes(4 * n))),
        Key("tokenizer.ggml.merges", gguf_samples.ARRAY, array(gguf_samples.STRING, n, merges)),
    )
    path = _write(tmp_path, File(keys=keys).bytes())
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        open_gguf(path, kind_check=True).close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.050


@pytest.mark.parametrize("case", gguf_samples.hostile_files(), ids=lambda c: c.label)
def test_malformed_headers_are_refused_with_the_place(tmp_path: Path, case: Hostile) -> None:
    path = _write(tmp_path, case.content)
    start = time.process_time()
    with pytest.raises(GGUFError, match=case.message) as caught:
        open_gguf(path)
    assert time.process_time() - start < 1
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.isprintable()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = SOUND.bytes()
    last = len(content) - SOUND_DATA_BYTES + 160 + 48  # the last tensor ends before its padding
    for n in range(last):
        with pytest.raises(GGUFError, match=r"past the end|outside the file"):
            open_gguf(_write(tmp_path, content[:n]))
    open_gguf(_write(tmp_path, content[:last])).close()


def test_overlong_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_shard, "_FIRST_READ", 8)
    monkeypatch.setattr(gguf_shard, "_LONGEST_HEADER", 256)
    with pytest.raises(GGUFError, match="header goes on beyond"):
        open_gguf(_write(tmp_path, SOUND.bytes()))
    monkeypatch.setattr(gguf_shard, "_LONGEST_HEADER", 1 << 20)
    open_gguf(_write(tmp_path, SOUND.bytes())).close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("missing", "No such file"), (".", "is a folder"), ("fifo", "regular")):
        with pytest.raises(GGUFError, match=message):
            open_gguf(tmp_path / name)


def _model(folder: Path, name: str, *keys: Key, tensors: bool = True) -> GGUFFile:
    data = File(keys=keys) if tensors else File(keys=keys, tensors=(), data=b"")
    return open_gguf(_write(folder, data.bytes(), name))


def _string(key: str, value: str) -> Key:
    return Key(key, gguf_samples.STRING, gguf_samples.text(value))


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ([("general.type", "adapter")], True, "is a LoRA adapter"),
        ([("general.type", "mmproj")], True, r"is a multimodal projector \(mmproj\)"),
        ([("general.architecture", "clip")], True, r"is a multimodal projector \(mmproj\)"),
        ([("general.type", "imatrix")], True, "is an importance matrix"),
        ([("imatrix.datasets", "x")], True, "is an importance matrix"),
        ([("general.architecture", "controlvector")], True, "is a control vector"),
        ([("general.architecture", "llama")], False, "a vocabulary only"),
        ([("general.name", "x")], True, "general.architecture is missing"),
    ],
)
def test_what_is_no_language_model_is_refused_by_what_it_is(
    tmp_path: Path, keys: list[tuple[str, str]], tensors: bool, message: str
) -> None:
    with _model(tmp_path, "f.gguf", *(_string(*k) for k in keys), tensors=tensors) as file:
        with pytest.raises(GGUFError, match=message):
            require_language_model(file)
        with pytest.raises(GGUFError, match=message):
            open_gguf(file.paths[0], kind_check=True)


def test_rows_are_ranges_of_the_tensor_and_buffers_are_reused(small: Path) -> None:
    with open_gguf(small) as file:
        tensor = file.tensor("blk.1.ffn_down_exps.weight")
        assert (tensor.row_length, tensor.n_rows, tensor.row_bytes) == (512, 768, 1024)
        everything = file.read_rows(tensor, 0, tensor.n_rows)
        buffer = np.zeros(8 * tensor.row_bytes, np.uint8)
        part = file.read_rows(tensor, 5, 11, buffer)
        assert np.shares_memory(part, buffer)
        np.testing.assert_array_equal(part, everything[5:11])
        with pytest.raises(ValueError, match="cannot hold"):
            file.read_rows(tensor, 0, 9, buffer)


def test_threads_may_read_at_once(small: Path) -> None:
    with open_gguf(small) as file:
        tensor = file.tensor("blk.0.ffn_down_exps.weight")
        expected = file.read_rows(tensor, 0, tensor.n_rows)
        wrong: list[int] = []

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(200):
                start = int(rng.integers(tensor.n_rows - 16))
                if not np.array_equal(file.read_rows(tensor, start, start + 16),
                                      expected[start : start + 16]):  # fmt: skip
                    wrong.append(start)

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_a_file_cut_short_while_open_is_an_error(small: Path) -> None:
    with open_gguf(small) as file:
        tensor = file.tensors[-1]
        file.require_unchanged()
        os.truncate(small, tensor.offset + 3)
        with pytest.raises(GGUFError, match=re.escape(tensor.name) + ".*cut short"):
            file.read_rows(tensor, 0, tensor.n_rows)
        with pytest.raises(GGUFError, match="changed while"):
            file.require_unchanged()


def test_a_file_written_to_while_open_is_noticed(small: Path) -> None:
    with open_gguf(small) as file:
        with small.open("r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(b"x")
        with pytest.raises(GGUFError, match="changed while"):
            file.require_unchanged()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    path = tmp_path / "model.gguf"
    gguf_samples.write_model(path, rng=np.random.default_rng(3), split_max_tensors=4)
    return sorted(tmp_path.glob("model-*.gguf"))


def test_shards_open_as_one_given_any_of_them(shards: list[Path], tmp_path: Path) -> None:
    assert len(shards) == 3
    whole = gguf_samples.write_model(tmp_path / "whole.gguf", rng=np.random.default_rng(3))
    with open_gguf(whole) as one:
        for path in shards:
            with open_gguf(path, kind_check=True) as file:
                assert file.paths == tuple(shards)
                assert file.n_bytes == sum(p.stat().st_size for p in shards)
                assert file.n_layers == 2
                assert [t.name for t in file.tensors] == [t.name for t in one.tensors]
                for mine, theirs in zip(file.tensors, one.tensors, strict=True):
                    np.testing.assert_array_equal(
                        file.read_rows(mine, 0, mine.n_rows),
                        one.read_rows(theirs, 0, theirs.n_rows),
                    )


def test_missing_shards_are_refused(shards: list[Path]) -> None:
    shards[1].unlink()
    for path in (shards[0], shards[2]):
        with pytest.raises(GGUFError, match=r"00002-of-00003.gguf: cannot be opened"):
            open_gguf(path)


def test_mixed_and_renamed_shards_are_refused(shards: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    gguf_samples.write_model(other, rng=np.random.default_rng(4), n_layers=5, split_max_tensors=8)
    originals = {p: p.read_bytes() for p in shards}
    others = sorted(tmp_path.glob("other-*.gguf"))
    for target, content, message in (
        (shards[1], originals[shards[0]], "split.no is 0, expected 1"),
        (shards[2], originals[shards[1]], "split.no is 1, expected 2"),
        (shards[1], others[1].read_bytes(), "split.tensors.count is 10, expected"),
    ):
        target.write_bytes(content)
        with pytest.raises(GGUFError, match=message):
            open_gguf(shards[0])
        target.write_bytes(originals[target])
    open_gguf(shards[0]).close()


def test_a_shard_under_another_name_is_refused(shards: list[Path], tmp_path: Path) -> None:
    renamed = shards[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(GGUFError, match=r"split.count is 3, expected 1"):
        open_gguf(renamed)


@pytest.mark.parametrize("number", ["00000-of-00003", "00004-of-00003", "00001-of-00000"])
def test_impossible_shard_numbers_are_refused(tmp_path: Path, number: str) -> None:
    path = _write(tmp_path, SOUND.bytes(), f"model-{number}.gguf")
    with pytest.raises(GGUFError, match=r"shard \d of \d cannot be"):
        open_gguf(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    def shard(number: int) -> bytes:
        u16, i32 = gguf_samples.U16, gguf_samples.I32
        keys = (
            Key("split.no", u16, struct.pack("<H", number)),
            Key("split.count", u16, b"\x02\x00"),
            Key("split.tensors.count", i32, struct.pack("<i", 2)),
        )
        return File(keys=keys, tensors=(Tensor("same", (8,)),), data=bytes(32)).bytes()

    for number in (0, 1):
        _write(tmp_path, shard(number), f"m-{number + 1:05d}-of-00002.gguf")
    with pytest.raises(GGUFError, match=r"00002-of-00002.gguf: tensor 'same' is in another shard"):
        open_gguf(tmp_path / "m-00001-of-00002.gguf")


def test_20000_tensors_open_within_a_second(tmp_path: Path) -> None:
    n = 20_000
    tensors = tuple(Tensor(f"blk.{i}.ffn_up.weight", (8,), 0, 32 * i) for i in range(n))
    path = _write(tmp_path, File(tensors=tensors, data=bytes(32 * n)).bytes())
    start = time.process_time()
    with open_gguf(path) as file:
        assert len(file.tensors) == n
        assert file.tensor("blk.19999.ffn_up.weight").offset == path.stat().st_size - 32
    assert time.process_time() - start < 1
