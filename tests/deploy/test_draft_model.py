"""A draft model that llama.cpp refuses is refused, and what makes drafts worse is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from typer.testing import CliRunner

import ramgguf
from bigram_model import write_bigram_model
from ramgguf.cli.app import app
from ramgguf.core.errors import BudgetError
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.beside import BesideModel
from ramgguf.deploy.draft_model import draft_bpw
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.evaluate.draft_agreement import DraftAgreement, draft_agreement
from ramgguf.evaluate.held_out import HeldOutScore, WindowScore
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan
from tiny_models import write_tiny_model

SHAPE = ContextShape(512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    write_tiny_model(folder / "m.gguf", weight_type="F16")
    return folder


@pytest.fixture(scope="module")
def measurement(folder: Path) -> Measurement:
    return ramgguf.measure(folder / "m.gguf", threads=1)


def _planned(measurement: Measurement, draft: Path, **options: Any) -> Plan:
    request = MemoryRequest(SHAPE, 200_000_000, beside=BesideModel(draft=draft))
    return ramgguf.plan(measurement, MemoryLimit(request), min_sqnr_db=0, **options)


def _edited(path: Path, source: Path, edit: Callable[[gguf.GGUFReader], None]) -> Path:
    """Write a copy of a model whose header an edit changes in place."""
    path.write_bytes(source.read_bytes())
    reader = gguf.GGUFReader(path, "r+")
    edit(reader)
    reader.data.flush()
    return path


def _token_changed(reader: gguf.GGUFReader) -> None:
    field = reader.fields["tokenizer.ggml.tokens"]
    part = field.parts[field.data[100]]
    part[0] = ord("~")


def test_a_draft_of_another_tokenizer_is_refused_with_what_differs(
    folder: Path, measurement: Measurement
) -> None:
    draft = _edited(folder / "token.gguf", folder / "m.gguf", _token_changed)
    with pytest.raises(BudgetError, match=r"its token 100 is '~.*llama\.cpp refuses it"):
        _planned(measurement, draft)
    write_tiny_model(folder / "spm.gguf", tokenizer="llama")
    with pytest.raises(BudgetError, match="its tokenizer is llama, the model's gpt2"):
        _planned(measurement, folder / "spm.gguf")
    write_tiny_model(folder / "bos.gguf", add_bos=True)
    with pytest.raises(BudgetError, match="it begins a text with BOS and the model does not"):
        _planned(measurement, folder / "bos.gguf")
    write_tiny_model(folder / "more.gguf", extra_tokens=200)
    with pytest.raises(BudgetError, match="tokens and the model"):
        _planned(measurement, folder / "more.gguf")
    write_tiny_model(folder / "few.gguf", extra_tokens=5)  # llama.cpp allows 128 more
    assert _planned(measurement, folder / "few.gguf").memory is not None


def test_few_bits_of_the_draft_or_of_the_model_are_said(
    folder: Path, measurement: Measurement
) -> None:
    write_tiny_model(folder / "draft.gguf", weight_type="F16", seed=5)
    ramgguf.quantize(
        folder / "draft.gguf", "1000%", folder / "low.gguf", effort="fast", min_sqnr_db=0,
        formats=["MXFP4"], pins=["weight=MXFP4"], threads=1,
    )  # fmt: skip
    with open_gguf(folder / "low.gguf") as low, open_gguf(folder / "draft.gguf") as draft:
        assert draft_bpw(low) == pytest.approx(4.25)
        assert draft_bpw(draft) == 16

    def said(draft: str, **options: object) -> list[str]:
        notes = _planned(measurement, folder / draft, **options).notes
        return [note for note in notes if "drafts may be accepted" in note]

    assert said("draft.gguf") == []
    (of_draft,) = said("low.gguf")
    assert "low.gguf has 4.25 bpw" in of_draft
    (of_model,) = said("draft.gguf", pins=["weight=IQ4_NL"])
    assert of_model.startswith("the model has 4.")


def _score(name: str, same: list[int]) -> HeldOutScore:
    windows = tuple(
        WindowScore(
            domain="prose" if i % 2 else "code", n_tokens=100, kld_sum=1.0, nll_sum=1.0,
            reference_nll_sum=1.0, n_same_top=n,
        )
        for i, n in enumerate(same)
    )  # fmt: skip
    return HeldOutScore(
        ramgguf_version="0", model=name, n_bytes=1, reference="draft.gguf", part="score", n_ctx=128,
        first_target=8, engine="0", windows=windows, seconds=1.0,
    )  # fmt: skip


def test_the_change_is_paired_over_windows_and_warns_only_of_notable_losses() -> None:
    source = _score("source", [60, 80, 40, 70, 50, 90, 60, 70, 65, 75])
    less = _score("less", [n - 10 for n in (60, 80, 40, 70, 50, 90, 60, 70, 65, 75)])
    found = DraftAgreement.of(Path("draft.gguf"), source, less)
    assert found.source.value == 0.66
    assert found.quantized.value == pytest.approx(0.56)
    assert found.change.value == found.change.low == found.change.high == pytest.approx(-0.1)
    assert found.is_worse
    little = _score("little", [n - 1 for n in (60, 80, 40, 70, 50, 90, 60, 70, 65, 75)])
    assert not DraftAgreement.of(Path("draft.gguf"), source, little).is_worse
    noisy = _score("noisy", [90, 10, 70, 20, 90, 30, 90, 10, 95, 95])
    assert not DraftAgreement.of(Path("draft.gguf"), source, noisy).is_worse
    few = DraftAgreement.of(Path("d"), _score("a", [60, 70]), _score("b", [40, 50]))
    assert few.change.low is None
    assert few.is_worse


def test_a_draft_agrees_with_its_own_model_and_less_with_a_perturbed_one(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model = write_bigram_model(tmp_path / "model.gguf")
    worse = write_bigram_model(tmp_path / "worse.gguf", noise=6)
    found = draft_agreement(model, model, worse, seconds=3, threads=1)
    assert found.source.value == 1
    assert found.quantized.value < 0.9
    assert found.is_worse


def test_the_score_of_a_model_with_a_draft_says_how_often_it_agrees(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    monkeypatch.chdir(folder)
    command = ["quantize", "m.gguf", "--memory", "200MB", "--context", "512", "--effort", "fast"]
    options = ["--draft", "m.gguf", "--min-sqnr", "0", "-t", "1", "--pin", "weight=IQ4_NL"]
    run = CliRunner().invoke
    shown = run(app, [*command, *options, "--score", "-o", str(tmp_path / "a.gguf")])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "draft model m.gguf: its most probable token is the source's at 100.0%" in text
    assert "warning: fewer drafts are accepted than with the source" in text
    quiet = run(app, [*command, *options, "--no-score", "-o", str(tmp_path / "b.gguf"), "--json"])
    assert json.loads(quiet.stdout)["draft"] is None
