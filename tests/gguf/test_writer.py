"""GGUF files written: read back by gguf.GGUFReader, and whole or absent whatever happens."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import gguf_copies
import gguf_samples
from gguf_copies import write_gguf
from gguf_samples import SOUND, File, Key, Tensor
from ramgguf.core import files
from ramgguf.core.errors import GGUFError
from ramgguf.core.files import AtomicFile, temporary_path, write_atomically
from ramgguf.gguf.header import GGML_TYPES, Value, ValueType, i32, string, u16, u32, u64
from ramgguf.gguf.layout import encoded_bytes, padded, plan_layout, planned_header_bytes
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.gguf.writer import GGUFOutput

OVERRIDES = {
    "general.file_type": u32(7),
    "general.name": string("smaller"),
    "ramgguf.version": string("0.1.0"),
    "ramgguf.budget": u64(2**40),
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return gguf_samples.write_model(tmp_path / "small.gguf", rng=np.random.default_rng(1))


def _types(source: GGUFFile) -> dict[str, str]:
    return {t.name: "Q8_0" for t in source.tensors if t.type_name == "F16" and t.shape[0] != 33}


def _encode(source: GGUFFile, tensor: TensorInfo, type_name: str) -> NDArray[np.uint8]:
    halves = source.read_rows(tensor, 0, tensor.n_rows).view(np.float16)
    encoded: NDArray[np.uint8] = quantize(halves.astype(np.float32), GGML_TYPES[type_name].id)
    return encoded


def _write(source: GGUFFile, path: Path, *, force: bool = False, split: int | None = None,
           chunk: int = 1000) -> tuple[Path, ...]:  # fmt: skip
    def blocks(tensor: TensorInfo, type_name: str) -> Iterator[bytes]:
        data = _encode(source, tensor, type_name).tobytes()
        for start in range(0, len(data), chunk):
            yield data[start : start + chunk]

    types = _types(source)
    return write_gguf(path, source, types, OVERRIDES, blocks, force=force, split_max_bytes=split)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_gguf_reader_reads_what_was_written(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with open_gguf(small) as source:
        assert _write(source, target) == (target,)
        old, new = GGUFReader(small), GGUFReader(target)
        kept = [k for k in old.fields if k not in OVERRIDES and not k.startswith("GGUF.")]
        for key in kept:
            assert new.fields[key].contents() == old.fields[key].contents()
            assert new.fields[key].types == old.fields[key].types
        assert new.fields["general.name"].contents() == "smaller"
        assert new.fields["general.file_type"].contents() == 7
        assert new.fields["ramgguf.version"].contents() == "0.1.0"
        assert new.fields["ramgguf.budget"].types == [GGUFValueType.UINT64]
        assert len(new.fields) == len(old.fields) + 3
        types, offset = _types(source), 0
        for mine, theirs in zip(new.tensors, old.tensors, strict=True):
            assert mine.name == theirs.name
            assert list(mine.shape) == list(theirs.shape)
            assert mine.tensor_type.name == types.get(mine.name, theirs.tensor_type.name)
            # The padded running sum, which ggml insists on.
            assert mine.field.parts[-1].item() == offset
            offset += padded(mine.n_bytes, 32)
            if mine.name in types:
                expected = _encode(source, source.tensor(mine.name), "Q8_0")
                np.testing.assert_array_equal(mine.data.reshape(expected.shape), expected)
            else:
                np.testing.assert_array_equal(mine.data, theirs.data)


def test_metadata_are_carried_over_byte_for_byte_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "in.gguf").write_bytes(SOUND.bytes())
    target = tmp_path / "out.gguf"
    with open_gguf(tmp_path / "in.gguf") as source:
        write_gguf(target, source, {}, {"tiny.u8": u16(9)}, lambda t, n: [])
    keys = [Key("tiny.u8", gguf_samples.U16, b"\x09\x00") if k.name == "tiny.u8" else k
            for k in SOUND.keys]  # fmt: skip
    data = SOUND.data[:102] + bytes(26) + SOUND.data[128:208] + bytes(16)
    assert target.read_bytes() == File(keys=keys, data=data).bytes()


def test_every_byte_is_planned(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        types = _types(source)
        header = planned_header_bytes(source, types, OVERRIDES)
        data = sum(
            padded(encoded_bytes(t, types.get(t.name, t.type_name)), source.alignment)
            for t in source.tensors
        )
        (target,) = _write(source, tmp_path / "out.gguf")
        assert target.stat().st_size == header + data
        assert GGUFReader(target).data_offset == header


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_types_and_alignments_are_planned_and_read_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    alignment = 1 << data.draw(st.integers(0, 7))
    shapes = data.draw(
        st.lists(st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)), max_size=6)
    )
    tensors, offset = [], 0
    for i, shape in enumerate(shapes):
        tensors.append(Tensor(f"t{i}.weight", shape, 0, offset))
        offset += padded(4 * int(np.prod(shape)), alignment)
    key = Key("general.alignment", gguf_samples.U32, alignment.to_bytes(4, "little"))
    content = np.random.default_rng(5).bytes(offset)
    file = File(keys=(key,), tensors=tensors, data=content, alignment=alignment)
    (folder / "in.gguf").write_bytes(file.bytes())
    limit = data.draw(st.none() | st.integers(100, 5000))
    with open_gguf(folder / "in.gguf") as source:
        types = {t.name: data.draw(st.sampled_from(["F32", "F16", "I8"])) for t in source.tensors}

        def blocks(tensor: TensorInfo, type_name: str) -> list[bytes]:
            return [bytes(range(1, 8)) * encoded_bytes(tensor, type_name)][:1]

        def cut(tensor: TensorInfo, type_name: str) -> list[bytes]:
            return [blocks(tensor, type_name)[0][: encoded_bytes(tensor, type_name)]]

        layout = plan_layout(folder / "o.gguf", source, types, {}, split_max_bytes=limit)
        paths = write_gguf(folder / "o.gguf", source, types, {}, cut, split_max_bytes=limit)
        assert [p.stat().st_size for p in paths] == [s.n_bytes for s in layout.shards]
        with open_gguf(paths[0]) as out:
            assert out.n_bytes == layout.n_bytes
            assert out.alignment == alignment
            assert [(t.name, t.shape) for t in out.tensors] == [
                (t.name, t.shape) for t in source.tensors
            ]
            for tensor in out.tensors:
                found = out.read_rows(tensor, 0, tensor.n_rows).tobytes()
                original = source.tensor(tensor.name)
                if original.type_name == tensor.type_name:
                    assert found == source.read_rows(original, 0, original.n_rows).tobytes()
                else:
                    assert found == cut(original, tensor.type_name)[0]
        for path in paths:
            offset = 0
            for t in GGUFReader(path).tensors:
                assert t.field.parts[-1].item() == offset
                offset += padded(t.n_bytes, alignment)


def test_split_outputs_keep_to_their_size_and_read_as_one(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        (whole,) = _write(source, tmp_path / "whole.gguf")
        limit = 450_000
        paths = _write(source, tmp_path / "out.gguf", split=limit)
        assert [p.name for p in paths] == [f"out-{i:05d}-of-00004.gguf" for i in (1, 2, 3, 4)]
        assert all(p.stat().st_size <= limit for p in paths)
        with open_gguf(paths[1]) as out, open_gguf(whole) as one:
            for mine, theirs in zip(out.tensors, one.tensors, strict=True):
                np.testing.assert_array_equal(
                    out.read_rows(mine, 0, mine.n_rows), one.read_rows(theirs, 0, theirs.n_rows)
                )
            assert {k for k in out.metadata if not k.startswith("split.")} == set(one.metadata)
        readers = [GGUFReader(p) for p in paths]
        for i, reader in enumerate(readers):
            split = {k: f for k, f in reader.fields.items() if k.startswith("split.")}
            assert {k: (f.types[0].name, f.contents()) for k, f in split.items()} == {
                "split.no": ("UINT16", i),
                "split.count": ("UINT16", 4),
                "split.tensors.count": ("INT32", len(source.tensors)),
            }
        assert "tokenizer.ggml.tokens" not in readers[1].fields
        # What was split becomes whole again: nothing is left of the split keys.
        with open_gguf(paths[0]) as out:
            joined = write_gguf(tmp_path / "joined.gguf", out, {}, {}, lambda t, n: [])
        assert joined[0].read_bytes() == whole.read_bytes()


@pytest.mark.real
@pytest.mark.parametrize("split", [None, 60_000_000])
def test_llama_cpp_loads_what_was_written(
    smol135: Path, tmp_path: Path, llama_cpp: ModuleType, split: int | None
) -> None:
    def blocks(tensor: TensorInfo, type_name: str) -> Iterator[NDArray[np.uint8]]:
        yield _encode(source, tensor, type_name)

    with open_gguf(smol135, kind_check=True) as source:
        types = {t.name: "Q8_0" for t in source.tensors if "ffn_" in t.name and len(t.shape) == 2}
        target = tmp_path / "out.gguf"
        paths = write_gguf(target, source, types, OVERRIDES, blocks, split_max_bytes=split)
        assert (len(paths) > 1) == (split is not None)
        params = llama_cpp.llama_model_default_params()
        model = llama_cpp.llama_model_load_from_file(bytes(paths[0]), params)
        assert model
        try:
            assert llama_cpp.llama_model_n_layer(model) == source.n_layers
            assert llama_cpp.llama_model_n_params(model) == source.n_weights
        finally:
            llama_cpp.llama_model_free(model)


def test_a_limit_that_is_not_exceeded_splits_nothing(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        assert _write(source, tmp_path / "out.gguf", split=10**9) == (tmp_path / "out.gguf",)


def test_values_must_suit_their_types() -> None:
    for value in (u16(-1), u16(70_000), u32(2**32), i32(2**31), Value(ValueType.ARRAY, 1)):
        with pytest.raises(GGUFError, match=r"key 'k': .* is no [A-Z0-9]+"):
            value.record("k")


def test_types_must_suit_their_tensors(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with open_gguf(small) as source:
        for types, message in (
            ({"blk.0.odd.weight": "Q8_0"}, "rows of 33 weights, no multiple of the 32 of Q8_0"),
            ({"blk.0.odd.weight": "Q9"}, "'Q9' is no ggml type"),
            ({"nothing": "Q8_0"}, "there is no tensor 'nothing'"),
        ):
            with pytest.raises(GGUFError, match=message):
                plan_layout(path, source, types, {})
        with pytest.raises(GGUFError, match=r"general.alignment is the source's"):
            plan_layout(path, source, {}, {"general.alignment": u32(64)})


def test_existing_files_need_force(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("older")
    with open_gguf(small) as source:
        with pytest.raises(GGUFError, match="exists; use --force"):
            _write(source, target)
        assert target.read_text() == "older"
        _write(source, target, force=True)
        assert open_gguf(target).name == "smaller"
        with pytest.raises(GGUFError, match="is a folder"):
            _write(source, tmp_path, force=True)


def test_the_source_is_never_the_output(small: Path, tmp_path: Path) -> None:
    before = small.read_bytes()
    (tmp_path / "link.gguf").hardlink_to(small)
    (tmp_path / "symlink.gguf").symlink_to(small)
    with open_gguf(small) as source:
        for name in (
            "small.gguf",
            "link.gguf",
            "symlink.gguf",
            "../" + tmp_path.name + "/small.gguf",
        ):
            with pytest.raises(GGUFError, match="is the source"):
                _write(source, tmp_path / name, force=True)
    assert small.read_bytes() == before


def test_a_file_that_appears_meanwhile_is_not_replaced(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.gguf"
    with open_gguf(small) as source:
        layout = plan_layout(target, source, {}, {})
        with GGUFOutput(layout, source, force=False) as out:
            for tensor in source.tensors:
                gguf_copies.copy(out, source, tensor)
            target.write_text("another's")
            with pytest.raises(GGUFError, match="exists"):
                out.commit()
    assert target.read_text() == "another's"
    assert _names(tmp_path) == ["out.gguf", "small.gguf"]


def test_incomplete_tensors_are_not_committed(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        layout = plan_layout(tmp_path / "out.gguf", source, {}, {})
        with GGUFOutput(layout, source, force=False) as out:
            for tensor in source.tensors[1:]:
                gguf_copies.copy(out, source, tensor)
            out.write_at("token_embd.weight", 0, bytes(100))
            with pytest.raises(GGUFError, match=r"'token_embd\.weight': lacks 153500 bytes"):
                out.commit()
            for offset, n in ((-1, 4), (153_600, 1), (153_000, 1000)):
                with pytest.raises(GGUFError, match="are not within its 153600 in F16"):
                    out.write_at("token_embd.weight", offset, bytes(n))
    assert _names(tmp_path) == ["small.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_an_interrupted_output(
    small: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def blocks(tensor: TensorInfo, type_name: str) -> Iterator[bytes]:
        yield bytes(10)
        raise error

    (tmp_path / "out.gguf").write_text("older")
    with open_gguf(small) as source, pytest.raises(error):
        write_gguf(tmp_path / "out.gguf", source, _types(source), {}, blocks, force=True)
    assert _names(tmp_path) == ["out.gguf", "small.gguf"]
    assert (tmp_path / "out.gguf").read_text() == "older"


def test_a_source_that_changed_is_not_committed(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        layout = plan_layout(tmp_path / "out.gguf", source, {}, {})
        with GGUFOutput(layout, source, force=False) as out:
            for tensor in source.tensors:
                gguf_copies.copy(out, source, tensor)
            os.utime(small, ns=(1, 1))
            with pytest.raises(GGUFError, match="changed while"):
                out.commit()
    assert _names(tmp_path) == ["small.gguf"]


def test_too_little_disk_is_said_before_work_starts(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    with open_gguf(small) as source, pytest.raises(GGUFError, match=r"has 1.00 kB free and the"):
        _write(source, tmp_path / "out.gguf")
    assert _names(tmp_path) == ["small.gguf"]


def test_a_missing_folder_is_an_error(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source, pytest.raises(GGUFError, match="there is no folder"):
        _write(source, tmp_path / "nowhere" / "out.gguf")


def test_threads_may_write_at_once(small: Path, tmp_path: Path) -> None:
    with open_gguf(small) as source:
        layout = plan_layout(tmp_path / "out.gguf", source, {}, {})
        with GGUFOutput(layout, source, force=False) as out:

            def copy(part: int) -> None:
                for tensor in source.tensors[part::3]:
                    gguf_copies.copy(out, source, tensor)

            threads = [threading.Thread(target=copy, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            out.commit()
        write_gguf(tmp_path / "one.gguf", source, {}, {}, lambda t, n: [])
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_an_orphan_is_removed_and_a_live_temporary_is_not(small: Path, tmp_path: Path) -> None:
    orphan = temporary_path(tmp_path / "of-another-output.gguf")
    orphan.write_text("left by a killed process")
    live = temporary_path(tmp_path / "out.gguf")
    with live.open("w") as held, open_gguf(small) as source:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(GGUFError, match="another process is writing it"):
            _write(source, tmp_path / "out.gguf")
        assert live.exists()
        assert not orphan.exists()
    with open_gguf(small) as source:
        _write(source, tmp_path / "out.gguf")
    assert _names(tmp_path) == ["out.gguf", "small.gguf"]


def test_an_orphan_that_is_a_second_name_of_a_finished_file_is_never_written_to(
    tmp_path: Path,
) -> None:
    finished, other = tmp_path / "finished", tmp_path / "other"
    finished.write_text("finished")
    temporary_path(finished).hardlink_to(finished)
    temporary_path(other).symlink_to(finished)
    with pytest.raises(GGUFError, match="is a link; remove it"):
        AtomicFile(other, 100, force=False, error=GGUFError)
    AtomicFile(finished, 100, force=True, error=GGUFError).abort()
    assert finished.read_text() == "finished"


def test_small_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for data in (b"", b"{}", b"older" * 1000, b"new"):
        write_atomically(path, data, error=GGUFError)
        assert path.read_bytes() == data
    assert _names(tmp_path) == ["plan.json"]


def test_file_systems_without_links_or_locks_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(files, "_fallocate", unsupported)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    file = AtomicFile(tmp_path / "a", 4, force=False, error=GGUFError)
    file.write_at(0, b"data")
    file.commit()
    assert (tmp_path / "a").read_bytes() == b"data"
    file = AtomicFile(tmp_path / "b", 4, force=False, error=GGUFError)
    (tmp_path / "b").write_text("another's")
    with pytest.raises(GGUFError, match="exists"):
        file.commit()
    file.abort()
    assert _names(tmp_path) == ["a", "b"]


_WRITER = """
import sys, time
from pathlib import Path
from gguf_copies import write_gguf
from ramgguf.gguf.reader import open_gguf

with open_gguf(Path(sys.argv[1])) as source:
    types = {t.name: "I8" for t in source.tensors if t.type_name == "F16"}
    def blocks(tensor, type_name):
        time.sleep(0.002)
        yield bytes([7]) * tensor.n_weights
    print("ready", flush=True)
    while True:
        write_gguf(Path(sys.argv[2]), source, types, {}, blocks, force=True)
"""


def test_a_killed_writer_leaves_the_older_or_the_newer_output(small: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    target = tmp_path / "out.gguf"
    before = small.read_bytes()
    with open_gguf(small) as source:
        types = {t.name: "I8" for t in source.tensors if t.type_name == "F16"}
        (finished,) = write_gguf(
            tmp_path / "finished.gguf", source, types, {},
            lambda t, n: [bytes([7]) * t.n_weights],
        )  # fmt: skip
    newer = finished.read_bytes()
    seen = set()
    for seconds in (0, *rng.uniform(0, 0.06, 12)):
        target.write_text("older")
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(small), str(target)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE, start_new_session=True,
        ) as writer:  # fmt: skip
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(seconds)
            writer.send_signal(signal.SIGKILL)
        content = target.read_bytes()
        assert content in (b"older", newer)
        seen.add(content)
        assert small.read_bytes() == before
        with open_gguf(small) as source:  # the next run clears up
            write_gguf(tmp_path / "next.gguf", source, {}, {}, lambda t, n: [], force=True)
        assert not list(tmp_path.glob(".*"))
    assert b"older" in seen
