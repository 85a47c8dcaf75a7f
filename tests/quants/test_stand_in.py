"""Stand-ins: what they hold, which one is taken, and what passes over them find."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

import ramgguf
from ramgguf import _core
from ramgguf.calibrate import activations
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError, EngineError, PlanError
from ramgguf.core.machine import Available
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants import stand_in as module
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.quants.stand_in import (
    FINE,
    ReadyStandIn,
    StandIn,
    chosen_stand_in,
    stand_in_layout,
    store_rows,
    write_stand_in,
)
from ramgguf.sensitivity import massive_activations
from tiny_models import write_tiny_model

ERROR = {"Q8_0": 1e-4, "Q6_K": 1e-3, "Q4_K": 2e-2}  # largest NMSE of Gaussian weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", weight_type="F16")


def _values(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensor(name)
    out = np.empty((tensor.n_rows, tensor.row_length), np.float32)
    _core.decode(tensor.type_name, file.read_rows(tensor, 0, tensor.n_rows), out)
    return out


@pytest.mark.parametrize("form", list(ERROR))
def test_a_stand_in_holds_the_model_rounded_to_its_format(
    model: Path, tmp_path: Path, form: str
) -> None:
    with open_gguf(model) as file:
        path = write_stand_in(file, form, tmp_path / "s.gguf", threads=2)
        assert path.stat().st_size == stand_in_layout(file, form, path).n_bytes
        with open_gguf(path) as made:
            assert [t.name for t in made.tensors] == [t.name for t in file.tensors]
            for tensor in file.tensors:
                now = made.tensor(tensor.name)
                rows = made.read_rows(now, 0, now.n_rows)
                stored = np.empty_like(rows)
                store_rows(file, tensor, now.type_name, threads=1, out=stored)
                np.testing.assert_array_equal(stored, rows)
                if len(tensor.shape) == 1:
                    assert now.type_name == tensor.type_name
                    continue
                # Rows of 64 and 128 weights are no superblocks: a format of 32 stands in for K's.
                assert now.type_name == {"Q8_0": "Q8_0", "Q6_K": "Q8_0", "Q4_K": "Q4_0"}[form]
                before, after = (_values(f, tensor.name) for f in (file, made))
                nmse = np.square(before - after).sum() / np.square(before).sum()
                assert 0 < nmse < ERROR[form]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def available(n_bytes: int) -> None:
        monkeypatch.setattr(module, "available_memory", lambda: Available(n_bytes, "a test"))

    return available


def test_auto_takes_the_largest_that_fits_the_memory(
    model: Path, memory: Callable[[int], None]
) -> None:
    said: list[str] = []
    with open_gguf(model) as file:
        sizes = {f: stand_in_layout(file, f, Path("x")).n_bytes for f in ("Q8_0", "Q4_K")}
        for room, expected in (
            (file.n_bytes, None),
            (file.n_bytes - 1, "Q8_0"),
            (sizes["Q8_0"] - 1, "Q4_K"),
            (0, "Q4_K"),
        ):
            memory(room + 1000 + module.BESIDE_BYTES)
            found = chosen_stand_in("auto", file, beside=1000, announce=said.append)
            assert found == expected
        assert chosen_stand_in("auto", file, beside=1000, allowed=FINE) == "Q6_K"
        assert chosen_stand_in("none", file) is None
        assert chosen_stand_in("q4_k", file) == "Q4_K"
    assert len(said) == 3
    assert "passes run on a stand-in in Q8_0 of" in said[0]
    assert "are available" in said[0]


def test_where_memory_is_unknown_passes_run_on_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untold() -> Available:
        raise BudgetError("this system does not tell")

    monkeypatch.setattr(module, "available_memory", untold)
    with open_gguf(model) as file:
        assert chosen_stand_in("auto", file) is None


def test_other_words_and_coarse_stand_ins_are_refused(model: Path) -> None:
    with open_gguf(model) as file:
        with pytest.raises(EngineError, match="'q2_k' is none of auto, none, q8_0"):
            chosen_stand_in("q2_k", file)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(EngineError, match="Q4_K is too coarse to read sensitivities on"):
            chosen_stand_in("q4_k", file, allowed=FINE)


@pytest.mark.parametrize(("choice", "tolerance"), [("q8_0", 0.06), ("q4_k", 0.4)])
def test_a_matrix_from_a_stand_in_is_near_the_models_and_says_so(
    model: Path, tmp_path: Path, choice: StandIn, tolerance: float
) -> None:
    pytest.importorskip("llama_cpp")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    paths = [tmp_path / f"{name}.gguf" for name in ("model", "stand-in")]
    words: tuple[StandIn, ...] = ("none", choice)
    for path, word in zip(paths, words, strict=True):
        found = ramgguf.calibrate(
            model, path, tokens="random", n_sequences=2, n_ctx=64, threads=1, stand_in=word,
            hessian=path.with_suffix(".hessian"), folder=scratch,
        )  # fmt: skip
        assert found.stand_in == (None if word == "none" else word.upper())
    assert list(scratch.iterdir()) == []  # the stand-in is gone
    before, after = (load_imatrix(path) for path in paths)
    assert set(before.entries) == set(after.entries)
    for name, entry in before.entries.items():
        a, b = entry.values, after.entries[name].values
        assert 0 < np.abs(a - b).sum() / np.abs(a).sum() < tolerance, name
    assert after.datasets == (f"random-drawn tokens, seed 0, on a stand-in in {choice.upper()}",)
    assert before.model_sample == after.model_sample  # both are the model's
    for path in (paths[1], paths[1].with_suffix(".hessian")):
        assert GGUFReader(path).fields["ramgguf.stand_in"].contents() == choice.upper()
    assert "ramgguf.stand_in" not in GGUFReader(paths[0]).fields


def test_a_stand_in_that_is_ready_serves_as_one_that_is_made(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with open_gguf(model) as file:
        path = write_stand_in(file, "Q8_0", tmp_path / "s.gguf", threads=1)
    ready = ReadyStandIn("Q8_0", path)
    assert ready.choice == "q8_0"
    words: dict[str, StandIn | ReadyStandIn] = {"made": "q8_0", "ready": ready}
    for name, word in words.items():
        ramgguf.calibrate(
            model, tmp_path / name, tokens="random", n_sequences=1, n_ctx=32, threads=1,
            stand_in=word,
        )  # fmt: skip
    assert (tmp_path / "made").read_bytes() == (tmp_path / "ready").read_bytes()
    found = [massive_activations(model, stand_in=s, threads=1) for s in (None, ready)]
    assert found[0].source == found[1].source
    assert found[0].ratios.keys() == found[1].ratios.keys()
    assert found[0].ratios != found[1].ratios


def test_hessians_are_planned_by_what_they_take(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the 4 GiB that they may take of a large model."""
    pytest.importorskip("llama_cpp")
    asked: list[int] = []

    def chosen(*_: object, beside: int, **__: object) -> None:
        asked.append(beside)

    monkeypatch.setattr(activations, "chosen_stand_in", chosen)
    for n_bytes in (1 << 32, 70_000):
        ramgguf.calibrate(
            model, tmp_path / "i", n_sequences=1, n_ctx=32, threads=1, force=True,
            hessian=tmp_path / "h", max_gram_bytes=n_bytes,
        )  # fmt: skip
    assert (tmp_path / "h").stat().st_size < asked[0] < 4_000_000
    assert asked[1] == 70_000


def test_sensitivities_on_a_stand_in_are_near_those_on_the_model(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    found = [
        ramgguf.sensitivity(
            model, tokens="random", encoder="rtn", n_sequences=2, n_ctx=64, threads=1,
            stand_in=word, journal=tmp_path / f"journal-{word}",
        )
        for word in ("none", "q8_0")
    ]  # fmt: skip
    assert [s.stand_in for s in found] == [None, "Q8_0"]
    assert ["round activations" in " ".join(s.notes) for s in found] == [False, True]
    ratios = [b.alpha / a.alpha for a, b in zip(found[0].tensors, found[1].tensors, strict=True)]
    assert 0.9 < float(np.median(ratios)) < 1.1
    assert max(ratios) < 1.5
    assert min(ratios) > 0.67
    assert ratios != [1.0] * len(ratios)
    with pytest.raises(PlanError, match="stand-in or choice of tokens"):
        ramgguf.sensitivity(
            model, tokens="random", encoder="rtn", n_sequences=2, n_ctx=64, threads=1,
            stand_in="none", journal=tmp_path / "journal-q8_0",
        )  # fmt: skip
    with pytest.raises(EngineError, match="too coarse"):
        ramgguf.sensitivity(model, stand_in="q4_k")


def test_sensitivities_run_on_the_model_whatever_the_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(module, "available_memory", lambda: Available(1, "a test"))
    found = ramgguf.sensitivity(
        model, tokens="random", encoder="rtn", n_sequences=1, n_ctx=64, threads=1
    )
    assert found.stand_in is None


def test_the_option_is_refused_where_it_would_do_nothing(model: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "o.gguf")
    command = ["quantize", str(model), "-b", "60%", "-o", output, "--stand-in"]
    done = CliRunner().invoke(app, [*command, "q8_0"])
    assert done.exit_code == 2
    assert "--calibrate nor --sensitivity measure" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["calibrate", str(model), "--stand-in", "q9"])
    assert done.exit_code == 2
    assert "'q9' is none of" in done.output
