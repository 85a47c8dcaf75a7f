"""A copy with one shard per layer is the model from any layer on, without moving data."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from numpy.typing import NDArray

from gguf_samples import finish_gguf
from ramgguf.core.errors import EngineError
from ramgguf.gguf import layered
from ramgguf.gguf.layered import LayeredCopy
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf, open_shards

N_LAYERS = 12  # names get shorter on the way: blk.11, blk.1


def _same(_tensor: TensorInfo, rows: NDArray[np.uint8], _to: str) -> NDArray[np.uint8]:
    return rows


def _write(path: Path, n_layers: int = N_LAYERS, missing: int | None = None) -> Path:
    rng = np.random.default_rng(0)
    out = GGUFWriter(path, "made-up")
    out.add_block_count(n_layers)
    out.add_leading_dense_block_count(2)
    out.add_embedding_scale(12.0)
    out.add_head_count_kv(list(range(n_layers)))
    out.add_array("made-up.other", [1.5, 2.5])
    out.add_custom_alignment(64)

    def add(name: str) -> None:
        out.add_tensor(name, rng.standard_normal((3, 5), np.float32))

    add("token_embd.weight")
    for layer in reversed(range(n_layers)):  # in whatever order
        if layer != missing:
            add(f"blk.{layer}.attn_norm.weight")
            add(f"blk.{layer}.ffn_up.weight")
    add("output_norm.weight")
    finish_gguf(out)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Iterator[GGUFFile]:
    with open_gguf(_write(tmp_path / "source.gguf")) as file:
        yield file


def _copy(source: GGUFFile, folder: Path) -> LayeredCopy:
    return LayeredCopy(source, folder, {}, {}, _same, threads=2)


def _loaded(copy: LayeredCopy) -> tuple[GGUFFile, dict[str, NDArray[np.uint8]]]:
    """Return what a loader finds in the copy's shards, and each tensor's data."""
    with open_shards(copy.paths) as file:
        return file, {t.name: file.read_rows(t, 0, t.n_rows) for t in file.tensors}


@pytest.mark.parametrize("start", [0, 1, 2, 5, 11])
def test_from_a_layer_on_it_is_the_model_with_layers_numbered_anew(
    source: GGUFFile, tmp_path: Path, start: int
) -> None:
    with _copy(source, tmp_path) as copy:
        copy.start_at(start)
        file, data = _loaded(copy)
    expected = {
        t.name: source.read_rows(t, 0, t.n_rows)
        for t in source.tensors
        if not t.name.startswith("blk.")
    }
    for layer in range(start, N_LAYERS):
        for part in ("attn_norm", "ffn_up"):
            tensor = source.tensor(f"blk.{layer}.{part}.weight")
            expected[f"blk.{layer - start}.{part}.weight"] = source.read_rows(tensor, 0, 3)
    assert data.keys() == expected.keys()
    assert all(np.array_equal(data[name], expected[name]) for name in data)
    metadata = file.metadata
    assert file.n_layers == N_LAYERS - start
    assert metadata.integer("made-up.leading_dense_block_count") == max(0, 2 - start)
    counts = metadata.numbers("made-up.attention.head_count_kv")
    assert counts is not None
    assert list(counts) == list(range(start, N_LAYERS))
    others = metadata.numbers("made-up.other")
    assert others is not None
    assert list(others) == [1.5, 2.5]
    assert metadata["made-up.embedding_scale"] == (1.0 if start else 12.0)


def test_no_data_move_and_the_first_layer_can_come_back(source: GGUFFile, tmp_path: Path) -> None:
    with _copy(source, tmp_path) as copy:
        before = [bytes(m) for m in copy.maps]
        starts = [copy.places[t.name].offset for t in source.tensors]
        copy.start_at(7)
        for k, old in enumerate(before):
            first = min(p.offset for p in copy.places.values() if p.shard == k)
            assert bytes(copy.maps[k])[first:] == old[first:]
        assert bytes(copy.maps[11]) != before[11]
        copy.start_at(0)
        assert [bytes(m) for m in copy.maps] == before
        assert starts == [copy.places[t.name].offset for t in source.tensors]


def test_what_is_written_to_a_place_is_what_a_loader_finds_from_every_layer(
    source: GGUFFile, tmp_path: Path
) -> None:
    with _copy(source, tmp_path) as copy:
        place = copy.places["blk.9.ffn_up.weight"]
        copy.maps[place.shard][place.offset : place.offset + place.n_bytes] = 7
        for start in (0, 4, 9):
            copy.start_at(start)
            assert (_loaded(copy)[1][f"blk.{9 - start}.ffn_up.weight"] == 7).all()


def test_the_copy_has_no_names_while_it_is_open(source: GGUFFile, tmp_path: Path) -> None:
    with _copy(source, tmp_path) as copy:
        assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]
        assert len(_loaded(copy)[1]) == len(source.tensors)


def test_where_files_need_names_it_starts_at_the_first_layer_only(
    source: GGUFFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layered, "_OPEN_FILES", tmp_path / "none")
    with _copy(source, tmp_path) as copy:
        assert copy.n_layers == 1
        with pytest.raises(EngineError, match="cannot start at layer 3"):
            copy.start_at(3)
        assert len(_loaded(copy)[1]) == len(source.tensors)
        copy.unlink()
        assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_a_model_with_a_layer_missing_starts_at_the_first_only(tmp_path: Path) -> None:
    path = _write(tmp_path / "pruned.gguf", missing=4)
    with open_gguf(path) as file, _copy(file, tmp_path) as copy:
        assert copy.n_layers == 1
        assert len(_loaded(copy)[1]) == len(file.tensors)


def test_a_folder_that_takes_no_files_is_an_error(source: GGUFFile, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="missing"):
        _copy(source, tmp_path / "missing")
