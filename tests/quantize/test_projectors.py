"""Projectors (mmproj files): what llama.cpp needs in full stays so, priors plan the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.errors import GGUFError, PlanError
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.gguf.architecture import layer_of, never_quantized, role_of
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan.priors import PART_PRIORS, ModelShape, prior
from small_projector import (
    MERGE,
    N_LAYERS,
    PATCH,
    PATCH_EMBEDDING,
    POSITIONS,
    PROJECTION,
    SIDE,
    projector_tensors,
    write_projector,
)
from tiny_models import WIDTH, write_tiny_model


@pytest.fixture(scope="module")
def mmproj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_projector(
        tmp_path_factory.mktemp("projector") / "mmproj.gguf", projector_tensors()
    )


_ENCODE = """
import ctypes, json, sys
import numpy as np
import llama_cpp
from llama_cpp import mtmd_cpp as mtmd
text, projector, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = llama_cpp.llama_model_load_from_file(
    text.encode(), llama_cpp.llama_model_default_params()
)
params = mtmd.mtmd_context_params_default()
params.use_gpu, params.n_threads, params.warmup = False, 1, False
context = mtmd.mtmd_init_from_file(projector.encode(), model, params)
assert context, "libmtmd does not load the projector"
pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3)).astype(np.uint8)
data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
bitmap = mtmd.mtmd_bitmap_init(side, side, data)
prompt = mtmd.mtmd_input_text()
prompt.text, prompt.add_special, prompt.parse_special = mtmd.mtmd_default_marker(), False, False
prompt.text_len = len(prompt.text)
chunks = mtmd.mtmd_input_chunks_init()
bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
found = []
for i in range(mtmd.mtmd_input_chunks_size(chunks)):
    chunk = mtmd.mtmd_input_chunks_get(chunks, i)
    if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
        assert mtmd.mtmd_encode_chunk(context, chunk) == 0
        n = mtmd.mtmd_input_chunk_get_n_tokens(chunk) * llama_cpp.llama_model_n_embd(model)
        found += np.ctypeslib.as_array(mtmd.mtmd_get_output_embd(context), (n,)).tolist()
print(json.dumps(found))
"""


def _embeddings(text: Path, projector: Path) -> NDArray[np.float64]:
    """Return what llama.cpp's image code makes of an image, in a process that it may end."""
    done = subprocess.run(
        [sys.executable, "-c", _ENCODE, str(text), str(projector), str(SIDE)],
        capture_output=True, text=True, check=False, env=os.environ | {"GGML_NO_BACKTRACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


def test_llama_cpp_sees_an_image_through_the_quantized_projector_as_before(
    tmp_path: Path, mmproj: Path
) -> None:
    pytest.importorskip("llama_cpp.mtmd_cpp")
    text = write_tiny_model(tmp_path / "text.gguf")
    before = _embeddings(text, mmproj)
    assert before.shape == ((SIDE // PATCH // MERGE) ** 2 * WIDTH,)
    for budget, least in (("70%", 0.999), ("35%", 0.95)):
        made = ramgguf.quantize(mmproj, budget, tmp_path / f"{budget}.gguf", effort="fast")
        assert made.n_bytes <= made.plan.budget
        after = _embeddings(text, made.paths[0])
        assert least < np.corrcoef(before, after)[0, 1] < 1
        assert any(a.format not in ("F32", "F16") for a in made.plan.assignments)


def test_convolutions_positions_norms_and_turned_matrices_keep_their_type(
    tmp_path: Path, mmproj: Path
) -> None:
    made = ramgguf.quantize(
        mmproj, "99%", tmp_path / "out.gguf", formats=["Q4_0"], pins=["weight=Q4_0"],
        min_sqnr_db=0, effort="fast",
    )  # fmt: skip
    given = {a.name: a.format for a in made.plan.assignments}
    assert given[PATCH_EMBEDDING] == "F16"
    assert given[POSITIONS] == given["v.blk.0.ln1.weight"] == "F32"
    assert given[PROJECTION] == "F16"  # llama.cpp turns it before it multiplies
    assert {f for n, f in given.items() if "attn" in n and n.endswith("weight")} == {"Q4_0"}
    with open_gguf(mmproj) as source, open_gguf(made.paths[0]) as out:
        for name in (PATCH_EMBEDDING, POSITIONS, PROJECTION):
            a, b = source.tensor(name), out.tensor(name)
            assert np.array_equal(
                source.read_rows(a, 0, a.n_rows), out.read_rows(b, 0, b.n_rows)
            )  # fmt: skip
        assert out.metadata.string("clip.projector_type") == "gemma3"


KEPT = {
    "a.conv1d.0.weight": (3, 128, 512),
    "a.downsample.conv.weight": (64, 512),
    "v.blk.0.conv_dw.weight": (32, 512),
    "a.blk.0.conv_dw.weight": (32, 512),
    "mm.model.peg.0.weight": (64, 4, 512),
    "a.gen.code.embd.weight": (256, 512),
    "a.gen.wav.quant.rest.codebook.weight": (256, 512),
    "v.patch_embd.weight": (256, 512),
    "resampler.pos_embed_k": (256, 512),
    "resampler.query": (256, 64),
    PROJECTION: (256, 512),
}
PRODUCTS = {
    "v.blk.3.attn_qkv.weight": (256, 768),
    "v.blk.3.ffn_down_exps.weight": (256, 256, 4),
    "a.blk.3.conv_pw1.weight": (256, 512),
    "mm.0.weight": (256, 512),
    "mm.model.fc.weight": (256, 512),
    "resampler.attn.q.weight": (256, 256),
    "v.deepstack.1.fc1.weight": (256, 512),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_product_is_kept(name: str) -> None:
    assert never_quantized(name, KEPT[name], "clip") is not None


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_may_be_quantized(name: str) -> None:
    assert never_quantized(name, PRODUCTS[name], "clip") is None


def test_rules_of_projectors_are_no_rules_of_language_models() -> None:
    for name in (PROJECTION, "a.gen.code.embd.weight", "a.downsample.conv.weight"):
        assert never_quantized(name, (256, 512), "llama") is None


def test_layers_of_encoders_count_as_layers_and_roles_tell_the_projector() -> None:
    assert [layer_of(f"{s}.blk.7.attn_q.weight") for s in ("v", "a", "v.sam", "x")] == [
        7, 7, 7, None
    ]  # fmt: skip
    assert role_of("v.blk.7.attn_q.weight", "clip") == "attn_q"
    assert role_of("v.blk.7.ln1.weight", "clip") == "norm"
    for name in PRODUCTS:
        is_projector = not name.startswith(("v.blk", "a.blk"))
        assert (role_of(name, "clip") == "projector") == is_projector
    assert role_of("mm.0.weight", "llama") == "other"


def test_first_and_last_layers_and_the_projector_matter_more(mmproj: Path) -> None:
    measured = ramgguf.measure(mmproj, threads=1)
    assert any("a multimodal projector: priors guess" in note for note in measured.notes)
    shape = ModelShape.of(measured)
    assert shape.n_layers == N_LAYERS
    found = {t.name: prior(t, shape) for t in measured.tensors}
    for part in ("attn_q", "attn_v", "attn_out", "ffn_up", "ffn_down"):
        of_part = [found[f"v.blk.{i}.{part}.weight"] / PART_PRIORS[part] for i in range(N_LAYERS)]
        assert min(of_part[0], of_part[-1]) >= 3
        assert max(of_part[2:-1]) < 3 <= min(of_part[0], of_part[-1])
    assert found[PROJECTION] == 3


def test_an_effort_is_fast_and_says_why(tmp_path: Path, mmproj: Path) -> None:
    out = tmp_path / "out.gguf"
    done = CliRunner().invoke(
        app, ["quantize", str(mmproj), "-b", "60%", "-o", str(out), "--effort", "best"]
    )
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "effort best is fast: a projector predicts no text" in said
    assert "note: a multimodal projector: priors guess what matters, and no KLD" in said
    assert "--sensitivity measure" not in said  # which could not
    assert "held-out" not in said
    assert out.exists()
    lines: list[str] = []
    made = ramgguf.quantize(
        mmproj, "60%", out, effort="fast", score=True, force=True, announce=lines.append
    )
    assert made.score is None
    assert [line for line in lines if line.startswith("not scored: a projector predicts no text")]


def test_what_needs_a_language_model_is_refused_by_name(tmp_path: Path, mmproj: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(PlanError, match="max_kld cannot be kept to: a projector predicts no text"):
        ramgguf.quantize(mmproj, output=out, max_kld=0.02)
    with pytest.raises(PlanError, match="a least speed cannot be kept to"):
        ramgguf.quantize(mmproj, "60%", out, min_speed=10)
    with pytest.raises(PlanError, match="refine cannot be kept to"):
        ramgguf.quantize(mmproj, "60%", out, refine=3)
    memory = MemoryLimit(MemoryRequest(ContextShape(1024), 10**9))
    with pytest.raises(PlanError, match="has no context of its own: give a budget in bytes"):
        ramgguf.quantize(mmproj, memory, out)
    with pytest.raises(GGUFError, match=r"is a multimodal projector.*which `measure` and"):
        ramgguf.calibrate(mmproj, out)
    assert not list(tmp_path.iterdir())
