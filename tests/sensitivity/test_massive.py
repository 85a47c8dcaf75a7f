"""Massive activations: the blocks that have them are found, and their tensors get their formats."""

import re
from pathlib import Path

import pytest

import ramgguf
from massive_model import MADE_IN, TAKEN_BACK_IN, write_massive_model
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import open_gguf
from ramgguf.quantize.protection import MOST_BYTES, protected_formats
from ramgguf.sensitivity import MassiveActivations, massive_activations
from small_models import ARCHITECTURES, DRAFTING, Architecture, write_small_model
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

OTHERS = [a for a in ARCHITECTURES if a.name in ("qwen3moe", "gemma3", "mamba")] + [DRAFTING]
CRUCIAL = [f"blk.{TAKEN_BACK_IN}.ffn_{part}.weight" for part in ("gate", "down")]
FEW_BITS = [f"blk.{TAKEN_BACK_IN}.ffn=Q4_0"]
BUDGET = "1.02MB"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_massive_model(tmp_path_factory.mktemp("massive") / "massive-f16.gguf")


@pytest.fixture(scope="module")
def found(model: Path) -> MassiveActivations:
    return massive_activations(model, threads=1)


def test_the_blocks_that_make_it_and_take_it_back_are_found(found: MassiveActivations) -> None:
    assert found.layers == (MADE_IN, TAKEN_BACK_IN)
    assert MassiveActivations.from_json(found.to_json()) == found


def test_first_tokens_depend_on_the_block_that_takes_it_back(found: MassiveActivations) -> None:
    """In the others, large weights are a format's largest value, and not rounded."""
    for reading in found.readings:
        if reading.name in CRUCIAL:
            assert reading.kld_first > 0.1
            assert reading.kld_first > 10 * reading.kld_later
        else:
            assert reading.kld_first < 0.1


def test_formats_for_them_lower_the_first_tokens_kld_for_two_percent_of_the_bytes(
    model: Path, found: MassiveActivations, tmp_path: Path
) -> None:
    before = ramgguf.quantize(
        model, BUDGET, tmp_path / "a.gguf", effort="fast", min_sqnr_db=0, pins=FEW_BITS
    )
    pins = protected_formats(found, before.plan)
    assert set(pins) == {f"^{re.escape(name)}$=Q8_0" for name in CRUCIAL}
    after = ramgguf.quantize(
        model, BUDGET, tmp_path / "b.gguf", effort="fast", min_sqnr_db=0, pins=pins
    )
    assert after.n_bytes <= after.plan.budget
    raised = sum(
        a.n_bytes - b.n_bytes
        for a, b in zip(after.plan.assignments, before.plan.assignments, strict=True)
        if a.name in CRUCIAL
    )
    assert 0 < raised <= MOST_BYTES * before.plan.n_bytes
    files = [before.paths[0], after.paths[0]]
    bad, good = score_held_out(files, model, n_ctx=2, first_target=1, max_rounds=2, threads=1)
    assert good.overall().kld.value < 0.4 * bad.overall().kld.value


def test_the_users_own_pins_and_formats_are_respected(
    model: Path, found: MassiveActivations
) -> None:
    plan = ramgguf.plan(ramgguf.measure(model), BUDGET, min_sqnr_db=0, pins=FEW_BITS)
    own = [f"blk.{TAKEN_BACK_IN}.ffn_gate=Q4_0"]
    assert not any("ffn_gate" in pin for pin in protected_formats(found, plan, pinned=own))
    allowed = protected_formats(found, plan, allowed=["Q4_0", "Q5_1"])
    assert allowed
    assert all(pin.endswith("=Q5_1") for pin in allowed)


def test_a_model_without_them_has_nothing_to_protect(tmp_path: Path) -> None:
    plain = write_tiny_model(tmp_path / "plain-f16.gguf", weight_type="F16")
    none = massive_activations(plain, threads=1)
    assert none.layers == ()
    assert none.readings == ()


@pytest.mark.parametrize("architecture", OTHERS, ids=lambda a: a.name)
def test_the_probe_reads_every_feed_forward_block_that_makes_the_text(
    architecture: Architecture, tmp_path: Path
) -> None:
    """Experts, sliding windows, a model without such blocks, and one that drafts tokens; no BOS."""
    path = write_small_model(tmp_path / "m.gguf", architecture, tokenizer=True)
    found = massive_activations(path, threads=1)
    with open_gguf(path) as file:
        trunk = range(file.n_trunk_layers or 0)
        expected = {
            t.name for t in file.tensors if ".ffn_down" in t.name and layer_of(t.name) in trunk
        }
    assert set(found.ratios) == expected
    assert all(0 < ratio < 1e6 for ratio in found.ratios.values())
    assert {layer_of(r.name) for r in found.readings} == set(found.layers)
