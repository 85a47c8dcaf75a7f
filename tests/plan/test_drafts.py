"""Blocks that draft tokens: a plan that gives them few bits says so."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.measure.result import Measurement
from ramgguf.plan.result import Plan


def _measured(path: Path, *, drafts: bool) -> Measurement:
    """Measure two layers and a block of multi-token prediction, or a third layer."""
    rng = np.random.default_rng(0)
    out = GGUFWriter(path, "glm4moe")
    out.add_block_count(3)
    if drafts:
        out.add_uint32("glm4moe.nextn_predict_layers", 1)
    names = [f"blk.{i}.{part}" for i in range(3) for part in ("attn_q", "ffn_up", "ffn_down")]
    names += ["blk.2.nextn.eh_proj"] if drafts else []
    for name in names:
        weights = rng.standard_normal((64, 256), dtype=np.float32).astype(np.float16)
        out.add_tensor(f"{name}.weight", weights)
        out.add_tensor(f"{name.rpartition('.')[0]}.{name[-3:]}_norm.weight", np.ones(256, "f4"))
    finish_gguf(out)
    return ramgguf.measure(path, formats=["Q3_K", "Q4_0", "Q6_K"], threads=1)


def _notes(plan: Plan) -> list[str]:
    return [note for note in plan.notes if "draft tokens" in note]


@pytest.mark.parametrize(
    ("trunk", "draft", "said"),
    [
        ("Q6_K", "Q3_K", "have 3.44 bpw, the others 6.56"),
        ("Q4_0", "Q3_K", "have 3.44 bpw, the others 4.50"),
        ("Q3_K", "Q3_K", None),  # the text has no more
        ("Q6_K", "Q4_0", None),
        ("Q3_K", "Q6_K", None),
    ],
)
def test_fewer_bits_for_drafts_than_for_the_text_are_a_note(
    tmp_path: Path, trunk: str, draft: str, said: str | None
) -> None:
    measured = _measured(tmp_path / "m.gguf", drafts=True)
    pins = [rf"blk\.[01]\.={trunk}", rf"blk\.2\.={draft}"]
    notes = _notes(ramgguf.plan(measured, "99%", pins=pins, min_sqnr_db=0))
    assert len(notes) == (said is not None)
    if said is not None:
        assert said in notes[0]
        assert r"--pin 'blk\.(2)\.=Q5_K'" in notes[0]


def test_the_pin_that_the_note_names_does_what_it_says(tmp_path: Path) -> None:
    measured = _measured(tmp_path / "m.gguf", drafts=True)
    plan = ramgguf.plan(measured, "99%", pins=[r"blk\.(2)\.=Q6_K"], min_sqnr_db=0)
    given = {a.name: a.format for a in plan.assignments}
    assert given["blk.2.nextn.eh_proj.weight"] == given["blk.2.ffn_up.weight"] == "Q6_K"
    assert not _notes(plan)


def test_the_last_layer_of_a_model_without_drafts_is_no_draft(tmp_path: Path) -> None:
    measured = _measured(tmp_path / "m.gguf", drafts=False)
    pins = [r"blk\.[01]\.=Q6_K", r"blk\.2\.=Q3_K"]
    assert not _notes(ramgguf.plan(measured, "99%", pins=pins, min_sqnr_db=0))
