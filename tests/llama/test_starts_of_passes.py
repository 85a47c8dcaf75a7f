"""Passes that begin at a later layer give what whole ones give, or are whole ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

pytest.importorskip("llama_cpp")

import small_models
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama import residuals
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.local_runner import LocalRunner
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.patched_weights import PatchedWeights
from small_models import ARCHITECTURES, Architecture, write_small_model
from tiny_models import write_tiny_model

N_LAYERS = 8
IDS = tuple(np.random.default_rng(k).integers(0, 256, 48).astype(np.int32) for k in range(2))
# gemma3: every sixth layer attends to all tokens. The others add positions, normalize what they are
# given, or keep the first layer's values.
BEGINS_AT = {"gemma3": {6}, "gpt2": set(), "rwkv7": set()}


# Positions in sections, which llama.cpp reads otherwise for rows than for tokens.
def _sections(out: GGUFWriter) -> None:
    small_models._common(out)
    out.add_rope_dimension_sections([16, 8, 8, 0])


M_ROPE = Architecture(
    "qwen2vl",
    _sections,
    lambda _: small_models.ATTENTION | small_models.DENSE,
    small_models.UNTIED,
)
CAUSAL = [a for a in ARCHITECTURES if not a.embeds and not a.has_encoder] + [M_ROPE]


def _deep(folder: Path, n_layers: int) -> Path:
    return write_tiny_model(folder / "deep.gguf", weight_type="F16", n_layers=n_layers)


@contextmanager
def _runner(path: Path) -> Iterator[tuple[GGUFFile, LocalRunner]]:
    """Open a model, and what runs passes over a copy beside it."""
    with (
        open_gguf(path) as file,
        LocalRunner(
            file, path.parent, n_ctx=64, threads=1, encoder="rtn", imatrix=None
        ) as runner,
    ):  # fmt: skip
        yield file, runner


@pytest.mark.parametrize("architecture", CAUSAL, ids=lambda a: a.name)
def test_all_architectures_give_the_same_kld_bit_by_bit_wherever_passes_begin(
    architecture: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_models, "N_LAYERS", N_LAYERS)
    path = write_small_model(tmp_path / "model.gguf", architecture)
    with _runner(path) as (file, runner):
        last = [t for t in file.tensors if t.name.startswith("blk.7.") and t.type_name == "F16"]
        one = ForwardRequest(((last[0].name, "Q4_0"),), IDS)
        ((_, whole),) = runner.run([one])
        assert whole.kld.any()
        begun = set()
        for start in (1, 3, 6):
            ((_, found),) = runner.run([replace(one, start=start)])
            assert np.array_equal(found.kld, whole.kld)
            assert found.nmse == whole.nmse
            if found.why_whole is None:
                begun.add(start)
            else:
                assert found.why_whole == f"from layer {start} on it computes other logits"
        assert begun == BEGINS_AT.get(architecture.name, {1, 3, 6})


@pytest.mark.parametrize("stand_in", [None, "Q8_0"])
def test_a_copy_gives_its_logits_from_every_layer_for_texts_in_several_chunks(
    tmp_path: Path, stand_in: str | None
) -> None:
    path = _deep(tmp_path, N_LAYERS)
    long = np.random.default_rng(5).integers(0, 256, 700).astype(np.int32)
    with (
        open_gguf(path) as file,
        PatchedModel(file, tmp_path, n_ctx=1024, n_threads=1, stand_in=stand_in) as model,
    ):
        assert model.model.n_batch < len(long)
        whole = [model.logits(ids) for ids in (long, IDS[0])]
        for start in (2, 5, 7, 3, 0):
            model.start_at(start, [long, IDS[0]])
            assert model.start == start
            for ids, logits in zip((long, IDS[0]), whole, strict=True):
                assert np.array_equal(model.logits(ids), logits)


def test_a_change_before_the_start_is_refused(tmp_path: Path) -> None:
    path = _deep(tmp_path, 4)
    with _runner(path) as (_, runner):
        for name, start in (("blk.1.ffn_up.weight", 2), ("token_embd.weight", 1)):
            with pytest.raises(EngineError, match="is after the changes"):
                next(runner.run([ForwardRequest(((name, "Q4_0"),), IDS, start)]))
        ((_, found),) = runner.run([ForwardRequest((("output.weight", "Q4_0"),), IDS, 3)])
        assert found.why_whole is None


def test_changes_of_a_pass_are_gone_before_the_next_layer_s_input_is_captured(
    tmp_path: Path,
) -> None:
    path = _deep(tmp_path, 4)
    with _runner(path) as (_, runner):
        one = ForwardRequest((("blk.3.ffn_up.weight", "Q4_0"),), IDS)
        first = ForwardRequest((("blk.1.ffn_up.weight", "Q4_0"),), IDS, 1)
        order = [one, first, replace(one, start=3), ForwardRequest((), IDS)]
        found = [result for _, result in runner.run(order)]
    assert np.array_equal(found[0].kld, found[2].kld)
    assert found[1].kld.any()
    assert not found[3].kld.any()


def test_a_graph_without_the_node_is_an_error(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf", weight_type="F16", n_layers=2)
    with (
        open_gguf(path) as file,
        PatchedModel(file, tmp_path, n_ctx=64, n_threads=1) as model,
    ):
        before = model.logits(IDS[0])
        with pytest.raises(EngineError, match="no node l_out-6"):
            model.residuals(IDS[0], 6)
        assert np.array_equal(model.logits(IDS[0]), before)


def test_a_pass_that_ends_at_a_layer_tells_the_error_there_wherever_it_begins(
    tmp_path: Path,
) -> None:
    path = _deep(tmp_path, 6)
    change = ("blk.3.ffn_up.weight", "Q4_0")
    with _runner(path) as (_, runner):
        wanted = [
            ForwardRequest((change,), IDS, 0, 4),
            ForwardRequest((), IDS, 0, 4),
            ForwardRequest((change,), IDS, 2, 4),
            ForwardRequest((change,), IDS, 3, 5),  # the last layer
            ForwardRequest((change,), IDS, 0, 2),  # before the change
            ForwardRequest((change,), IDS),
            ForwardRequest((), IDS),
        ]
        found = [result for _, result in runner.run(wanted)]
    with (
        open_gguf(path) as file,
        PatchedModel(file, tmp_path, n_ctx=64, n_threads=1) as model,
    ):
        weights = PatchedWeights(file, model, "rtn", None, 1)
        model.model._has_given_logits = False  # a buffer that no pass has filled may be all zeros
        before = [model.residuals(ids, 4).astype(np.float64) for ids in IDS]
        weights.put(*change)
        after = [model.residuals(ids, 4).astype(np.float64) for ids in IDS]
        assert not model.model._has_given_logits
        at_layer_3 = model.residuals(IDS[0], 3)
        ended = [((a - b) ** 2).sum(1) / (b**2).sum(1) for a, b in zip(after, before, strict=True)]
        assert not np.array_equal(at_layer_3, after[0])
    errors = [result.errors for result in found]
    assert errors[0] is not None
    assert errors[0] == pytest.approx(np.concatenate(ended), rel=1e-5)
    assert errors[1] is not None
    assert not errors[1].any()
    assert errors[2] is not None
    assert np.array_equal(errors[0], errors[2])
    assert errors[3] is not None
    assert errors[3].shape == (96,)
    assert errors[3].min() > 0
    assert errors[4] is not None
    assert not errors[4].any()
    assert [len(result.kld) for result in found] == [0, 0, 0, 0, 0, 96, 96]
    assert errors[5] is errors[6] is None
    assert found[5].kld.any()
    assert not found[6].kld.any()
    assert {result.nmse for result in found if result.nmse} == {found[0].nmse}


def test_where_a_graph_does_not_name_its_layers_a_pass_that_ends_there_tells_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _deep(tmp_path, 4)
    change = ("blk.1.ffn_up.weight", "Q4_0")
    with _runner(path) as (_, runner):
        monkeypatch.setattr(residuals, "NODE", "out_of_layer-{}")
        asked = [ForwardRequest((change,), IDS, end=2), ForwardRequest((change,), IDS)]
        ended, whole = (result for _, result in runner.run(asked))
    assert ended.errors is None
    assert ended.nmse == whole.nmse
    assert whole.kld.any()
