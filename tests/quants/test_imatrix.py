"""Importance matrices of llama.cpp: both file formats, experts, and whatever can be wrong."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_samples import (
    DENSE,
    EXPERTS,
    Floats,
    floats,
    legacy,
    legacy_entry,
    sound_legacy,
    sound_tensors,
    write_gguf,
)
from ramgguf.core.errors import GGUFError, ImatrixError
from ramgguf.gguf.header import string, u32
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.imatrix import imatrix_keys, load_imatrix


def test_a_gguf_matrix_holds_mean_squares_per_column(tmp_path: Path) -> None:
    imatrix = load_imatrix(write_gguf(tmp_path / "i.gguf", sound_tensors()))
    values = imatrix.importance(DENSE, (4, 10))
    assert values is not None
    assert values.tolist() == [[1, 2, 3, 4]]
    assert imatrix.datasets == ("wiki.txt", "more.txt")
    assert imatrix.n_chunks == 12


def test_an_expert_that_saw_no_token_has_the_mean_of_the_others(tmp_path: Path) -> None:
    imatrix = load_imatrix(write_gguf(tmp_path / "i.gguf", sound_tensors()))
    values = imatrix.importance(EXPERTS, (3, 2, 3))
    assert values is not None
    assert values.tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    assert imatrix.entries[EXPERTS].n_unused == 1


def test_one_count_serves_all_matrices_of_a_dense_weight(tmp_path: Path) -> None:
    tensors = {
        f"{DENSE}.in_sum2": floats(2, 4, 6, 8).reshape(2, 2),
        f"{DENSE}.counts": floats(2)[None],
    }
    imatrix = load_imatrix(write_gguf(tmp_path / "i.gguf", tensors))
    values = imatrix.importance(DENSE, (2, 5, 2))
    assert values is not None
    assert values.tolist() == [[1, 2], [3, 4]]


def test_an_entry_without_any_token_is_no_entry(tmp_path: Path) -> None:
    tensors = sound_tensors()
    tensors[f"{DENSE}.counts"] = floats(0)[None]
    imatrix = load_imatrix(write_gguf(tmp_path / "i.gguf", tensors))
    assert imatrix.importance(DENSE, (4, 10)) is None
    assert set(imatrix.entries) == {EXPERTS}


def test_a_legacy_matrix_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(sound_legacy())
    imatrix = load_imatrix(path)
    dense, experts = imatrix.importance(DENSE, (4, 10)), imatrix.importance(EXPERTS, (3, 9, 2))
    assert dense is not None
    assert experts is not None
    assert dense.tolist() == [[1, 2, 3, 4]]
    assert experts.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (imatrix.datasets, imatrix.n_chunks) == (("wiki.txt",), 7)


def test_a_legacy_matrix_may_end_after_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy(legacy_entry(DENSE, 0, floats(1, 2)), tail=b""))
    imatrix = load_imatrix(path)
    assert imatrix.entries[DENSE].values.tolist() == [[1, 2]]
    assert (imatrix.datasets, imatrix.n_chunks) == ((), None)


def test_one_matrix_serves_all_experts(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(sound_legacy())
    values = load_imatrix(path).importance(DENSE, (4, 3, 2))
    assert values is not None
    assert values.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_a_tensor_without_an_entry_has_no_importance(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(sound_legacy())
    assert load_imatrix(path).importance("token_embd.weight", (4, 10)) is None


def test_an_entry_for_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(sound_legacy())
    with pytest.raises(ImatrixError, match=r"'blk.0.attn_q.weight' has 4 values.* 1 x 8 columns"):
        load_imatrix(path).importance(DENSE, (8, 10))


def test_the_matrix_records_itself_as_llama_quantize_does(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", sound_tensors())
    assert imatrix_keys(load_imatrix(path).source) == {
        "quantize.imatrix.file": string(str(path)),
        "quantize.imatrix.dataset": string("wiki.txt"),
        "quantize.imatrix.entries_count": u32(2),
        "quantize.imatrix.chunks_count": u32(12),
    }


def test_a_model_is_not_an_importance_matrix(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", {DENSE: floats(1, 2)}, kind=None)
    with pytest.raises(ImatrixError, match=r"general\.type is None, expected .imatrix."):
        load_imatrix(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (f"{DENSE}.counts", None, "'blk.0.attn_q.weight.counts' is missing"),
        (f"{DENSE}.counts", floats(1, 1, 1)[:, None], "sums for 1 experts"),
        (f"{DENSE}.counts", floats(1, 1)[None], r"counts of shape \(1, 2\)"),
        (f"{DENSE}.counts", floats(np.nan)[None], "holds nan at 0"),
        (f"{DENSE}.in_sum2", floats(1, -2)[None], "holds -2.0 at 1"),
        (f"{DENSE}.in_sum2", floats(1, np.inf)[None], "holds inf at 1"),
        (f"{DENSE}.in_sum2", np.ones((1, 4), np.float16), "is F16, expected F32"),
    ],
)
def test_a_malformed_gguf_matrix_is_refused_by_name(
    tmp_path: Path, name: str, values: Floats | None, message: str
) -> None:
    tensors = sound_tensors()
    del tensors[name]
    if values is not None:
        tensors[name] = values
    with pytest.raises(ImatrixError, match=message):
        load_imatrix(write_gguf(tmp_path / "i.gguf", tensors))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "would take 4 bytes at byte 0 of 0"),
        (struct.pack("<i", 0), "there are no entries"),
        (struct.pack("<i", -1), "there are no entries"),
        (struct.pack("<i", 2**31 - 1) + bytes(64), "entry '' is empty"),
        (struct.pack("<ii", 1, -5) + bytes(64), "would take -5 bytes"),
        (struct.pack("<ii", 1, 2**30) + bytes(64), "has 1073741824 bytes"),
        (legacy(legacy_entry(DENSE, 1, floats())), "is empty"),
        (legacy(*[legacy_entry(DENSE, 1, floats(1))] * 2), "is there twice"),
        (legacy(legacy_entry(DENSE, 1, floats(1, np.nan))), "holds nan at 1"),
        (legacy(legacy_entry(DENSE, 1, floats(-1))), "holds -1.0 at 0"),
        (sound_legacy() + b"\0", "the matrix ends 1 byte before the file"),
    ],
)
def test_a_malformed_legacy_matrix_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(ImatrixError, match=message):
        load_imatrix(path)


@given(st.integers(0, len(sound_legacy()) - 1))
def test_a_legacy_matrix_cut_short_is_refused_unless_only_its_tail_is_gone(
    tmp_path_factory: pytest.TempPathFactory, length: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "i.dat"
    path.write_bytes(sound_legacy()[:length])
    tail = len(sound_legacy()) - 16
    if length in (tail, tail + 4):
        assert len(load_imatrix(path).entries) == 2
    else:
        with pytest.raises(ImatrixError):
            load_imatrix(path)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("any") / "i"
    path.write_bytes(data)
    with pytest.raises((ImatrixError, GGUFError)):
        load_imatrix(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.dat", tmp_path):
        with pytest.raises(ImatrixError, match="cannot be read"):
            load_imatrix(path)


def test_huge_sums_do_not_become_infinite(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    tensors = {f"{DENSE}.in_sum2": floats(largest, 1)[None], f"{DENSE}.counts": floats(0.5)[None]}
    imatrix = load_imatrix(write_gguf(tmp_path / "i.gguf", tensors))
    values = imatrix.entries[DENSE].values
    assert np.isfinite(np.full(1 << 20, 100.0, np.float32) * values.max()).all()
    assert np.isfinite((1 << 20) * np.float32(100.0) * values.max())


def test_the_writer_of_these_tests_writes_what_gguf_io_reads(tmp_path: Path) -> None:
    with open_gguf(write_gguf(tmp_path / "i.gguf", sound_tensors())) as file:
        assert {t.name: t.shape for t in file.tensors}[f"{EXPERTS}.in_sum2"] == (3, 3)
