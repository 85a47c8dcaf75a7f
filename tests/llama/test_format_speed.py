"""The speed of formats, measured on small models and kept."""

from pathlib import Path

import pytest

from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama import format_speed
from ramgguf.llama.format_speed import SpeedProfile, beyond_cache, format_speeds
from ramgguf.llama.speed_model import SpeedModel

pytest.importorskip("llama_cpp")

LAYERS_OF = 1 << 22


def _measure(*names: str, said: list[str] | None = None) -> SpeedProfile:
    return format_speeds(
        names, threads=1, n_bytes=LAYERS_OF, width=512, n_prompt=16, n_rounds=2,
        announce=lambda line: None if said is None else said.append(line),
    )  # fmt: skip


def test_formats_are_measured_once_and_others_added_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    first = _measure("Q4_0", "Q8_0", said=said)
    assert set(first.rates) == {"F16", "F32", "Q4_0", "Q8_0"}
    assert len(said) == 1
    again = _measure("Q8_0", said=said)
    assert again == first
    assert len(said) == 1
    more = _measure("Q4_K", "IQ2_XXS", said=said)  # IQ2_XXS is encoded by libggml
    assert set(more.rates) == {*first.rates, "Q4_K", "IQ2_XXS"}
    assert all(more.rates[name] == rate for name, rate in first.rates.items())
    assert "kept in" in said[1]
    (kept,) = (tmp_path / "ramgguf" / "speeds").iterdir()
    kept.write_text("{")
    assert set(_measure("Q4_0").rates) == {"F16", "F32", "Q4_0"}


def test_what_was_timed_before_an_interruption_is_kept_and_the_rest_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write, written = SpeedModel.write, []

    def interrupted(self: SpeedModel, path: Path, name: str) -> None:
        written.append(name)
        if name == "Q4_0":
            raise KeyboardInterrupt
        write(self, path, name)

    monkeypatch.setattr(SpeedModel, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _measure("Q4_0")
    (kept,) = (tmp_path / "ramgguf" / "speeds").iterdir()
    assert set(SpeedProfile.from_json(kept.read_text()).rates) == {"F16", "F32"}
    monkeypatch.setattr(SpeedModel, "write", write)
    said: list[str] = []
    assert set(_measure("Q4_0", said=said).rates) == {"F16", "F32", "Q4_0"}
    assert "with 1 format here" in said[0]


def test_a_weight_takes_a_time_of_the_right_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = _measure("Q4_0")
    for rate in found.rates.values():
        # From 0.05 to 50 thousand million weights a second, on one CPU.
        assert 2e-11 / 50 < rate.generation < 2e-8
        assert 2e-11 / 50 < rate.prompt < 2e-8
    assert found.rates["F32"].generation > found.rates["Q4_0"].generation
    assert 0 < found.layer_seconds < 1e-2


def test_a_format_that_llama_cpp_refuses_is_noted_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = SpeedModel.write

    def broken(self: SpeedModel, path: Path, name: str) -> None:
        write(self, path, name)
        if name == "Q4_0":
            path.write_bytes(path.read_bytes()[:1000])

    monkeypatch.setattr(SpeedModel, "write", broken)
    found = _measure("Q4_0", "Q4_1")
    assert "Q4_0" not in found.rates
    assert "could not load" in found.refused["Q4_0"]
    assert "Q4_1" in found.rates


def test_a_timed_model_has_the_bytes_that_were_asked_for(tmp_path: Path) -> None:
    model = SpeedModel.of_bytes(LAYERS_OF, 512, "Q4_0")
    model.write(tmp_path / "m.gguf", "Q4_0")
    with open_gguf(tmp_path / "m.gguf") as file:
        timed = [t for t in file.tensors if t.type_name == "Q4_0"]
        assert sum(t.n_weights for t in timed) == model.n_weights
        assert file.n_layers == model.n_layers
        assert LAYERS_OF <= sum(t.n_bytes for t in timed) <= 2 * LAYERS_OF
        assert {t.type_name for t in file.tensors} == {"F16", "F32", "Q4_0"}


@pytest.mark.parametrize(
    ("sizes", "n_bytes"),
    [
        (("32K", "1024K", "32768K"), 96 << 20),
        (("32K",), 64 << 20),
        (("1G",), 512 << 20),
        ((), 64 << 20),
        (("many",), 64 << 20),
    ],
)
def test_a_timed_model_is_larger_than_the_cpu_s_caches(
    tmp_path: Path, sizes: tuple[str, ...], n_bytes: int
) -> None:
    for k, size in enumerate(sizes):
        (tmp_path / f"index{k}").mkdir()
        (tmp_path / f"index{k}" / "size").write_text(f"{size}\n")
    assert beyond_cache(tmp_path) == n_bytes


def test_without_llama_cpp_the_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_speed, "llama_installed", lambda: False)
    with pytest.raises(EngineError, match=r"pip install 'ramgguf\[eval\]'"):
        _measure("Q4_0")
