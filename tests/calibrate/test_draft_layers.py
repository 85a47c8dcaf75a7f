"""Layers that draft tokens are calibrated where llama.cpp runs them, else named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

import ramgguf
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.capture import Tap
from ramgguf.llama.client import Engine
from ramgguf.llama.drafting import DraftLayers
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import TapWeights
from ramgguf.quants.coverage import coverage
from ramgguf.quants.hessian import load_hessians
from ramgguf.quants.imatrix import load_imatrix
from small_models import DRAFT_LAYER, DRAFTING, N_VOCAB, WIDTH, write_small_model

pytest.importorskip("llama_cpp")
BLOCK = f"blk.{DRAFT_LAYER}."
RUN: dict[str, Any] = {"n_sequences": 2, "n_ctx": 32, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("draft") / "m.gguf", DRAFTING, tokenizer=True)


def _weights(path: Path) -> list[str]:
    with open_gguf(path) as file:
        return [t.name for t in file.tensors if len(t.shape) > 1]


def _taken(path: Path, ids: np.ndarray, *, drafts: bool) -> Tap:
    """Return the tap of a sequence that is read in two chunks."""
    layers = (DRAFT_LAYER,) if drafts else ()
    tap = Tap(_weights(path), draft_layers=layers)
    with LlamaModel(
        path, n_ctx=64, n_threads=1, eval_callback=tap.callback, drafts=drafts
    ) as model:
        blocks = DraftLayers(model) if drafts else None
        for part in (ids[:20], ids[20:]):
            model.decode(part)
            tap.check()
            if blocks is not None:
                tap.is_drafting = True
                blocks.decode(part, model.states(len(part)))
                tap.check()
                tap.is_drafting = False
        if blocks is not None:
            blocks.close()
    return tap


def test_every_matrix_of_a_draft_layer_has_an_entry_and_a_hessian(
    model: Path, tmp_path: Path
) -> None:
    path, hessian = tmp_path / "i.gguf", tmp_path / "h.gguf"
    said: list[str] = []
    found = ramgguf.calibrate(
        model, path, tokens="random", hessian=hessian, announce=said.append, **RUN
    )
    assert found.missed == ()
    assert not any("draft" in line for line in said)
    imatrix = load_imatrix(path)
    mine = {name for name in imatrix.entries if name.startswith(BLOCK)}
    assert {f"{BLOCK}nextn.eh_proj.weight", f"{BLOCK}ffn_down_exps.weight"} <= mine
    with open_gguf(model) as file:
        assert file.draft_layers == {DRAFT_LAYER}
        covered = coverage(file, imatrix)
    assert covered is not None
    assert covered.missing == ()
    hessians = load_hessians(hessian)
    gram = hessians.get(f"{BLOCK}attn_q.weight", WIDTH)
    assert gram is not None
    squares = imatrix.entries[f"{BLOCK}attn_q.weight"].values[0] * found.n_tokens
    np.testing.assert_allclose(np.diag(gram), squares, rtol=1e-4)
    hessians.close()


def test_what_a_draft_layer_reads_is_the_token_and_the_state_before_it(model: Path) -> None:
    """Both are normalized: the token's embedding here, the trunk's output after its own norm."""
    ids = np.random.default_rng(0).integers(N_VOCAB, size=33, dtype=np.int32)
    sums = _taken(model, ids, drafts=True).taken.sums
    eh = sums[f"{BLOCK}nextn.eh_proj.weight"]
    assert eh.counts.tolist() == [33]
    tensors = {t.name: t.data for t in GGUFReader(model).tensors}
    embedded = tensors["token_embd.weight"].astype(np.float64)[ids]
    embedded /= np.sqrt(np.square(embedded).mean(axis=1, keepdims=True) + 1e-5)
    token = np.square(embedded * tensors[f"{BLOCK}nextn.enorm.weight"]).sum(axis=0)
    np.testing.assert_allclose(eh.squares[0, :WIDTH], token, rtol=0.02)
    # Of the first token there is no state before it: zeros. All others have a mean square of 1.
    plain = eh.squares[0, WIDTH:] / np.square(tensors[f"{BLOCK}nextn.hnorm.weight"])
    assert plain.sum() == pytest.approx(32 * WIDTH, rel=1e-3)


def test_the_trunk_has_the_same_sums_with_drafts_and_without(model: Path) -> None:
    ids = np.random.default_rng(1).integers(N_VOCAB, size=33, dtype=np.int32)
    plain, both = (_taken(model, ids, drafts=drafts).taken for drafts in (False, True))
    assert not any(name.startswith(BLOCK) for name in plain.sums)
    assert "output.weight" in plain.sums  # which the draft layer reads, too
    assert set(plain.sums) == {n for n in both.sums if not n.startswith(BLOCK)}
    for name, sums in plain.sums.items():
        np.testing.assert_allclose(both.sums[name].squares, sums.squares, rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(both.sums[name].counts, sums.counts)


def test_the_models_own_tokens_are_read_by_its_draft_layer_too(model: Path, tmp_path: Path) -> None:
    found = ramgguf.calibrate(model, tmp_path / "i.gguf", tokens="self,random", **RUN)
    assert found.missed == ()
    entry = load_imatrix(tmp_path / "i.gguf").entries[f"{BLOCK}nextn.eh_proj.weight"]
    assert entry.values.shape == (1, 2 * WIDTH)
    again = ramgguf.calibrate(model, tmp_path / "j.gguf", tokens="self,random", **RUN)
    assert again.n_tokens == found.n_tokens == 64
    assert (tmp_path / "i.gguf").read_bytes() == (tmp_path / "j.gguf").read_bytes()


def test_where_llama_cpp_does_not_run_them_they_have_no_entry_and_a_line_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Engine.ask

    def asked(self: Engine, request: Any, answer: Any) -> Any:
        if isinstance(request, TapWeights) and request.draft_layers:
            raise EngineError("no such graph")
        return ask(self, request, answer)

    monkeypatch.setattr(Engine, "ask", asked)
    said: list[str] = []
    path = tmp_path / "i.gguf"
    found = ramgguf.calibrate(model, path, tokens="random", announce=said.append, **RUN)
    assert any("no entry: no such graph" in line for line in said)
    assert f"{BLOCK}attn_q.weight" in found.missed
    assert "blk.1.attn_q.weight" in load_imatrix(path).entries
    with open_gguf(model) as file:
        covered = coverage(file, load_imatrix(path))
    assert covered is not None
    assert f"{BLOCK}attn_q.weight" in covered.missing
