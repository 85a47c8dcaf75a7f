"""What a division puts in RAM and on a GPU is what llama.cpp plans for a stand-in of a GPU."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

import gpu_stand_in
import ramgguf
from ramgguf.deploy.footprint import Footprint, FootprintEstimator
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.offload import place
from ramgguf.gguf.architecture import is_kept_by_cpu_moe
from ramgguf.gguf.layout import padded
from ramgguf.gguf.reader import open_gguf
from ramgguf.plan import divisions
from ramgguf.plan.result import Division
from ramgguf.quants import formats
from small_models import (
    ARCHITECTURES,
    ATTENTION,
    EXPERT_FFN,
    EXPERTS,
    HEAD,
    N_EXPERTS,
    N_LAYERS,
    UNTIED,
    WIDTH,
    Architecture,
    Shapes,
    _common,
    _experts,
    _weights,
    planned_types,
    write_small_model,
)

pytest.importorskip("llama_cpp")

SHAPE = ContextShape(4096)


def _drafting(out: GGUFWriter) -> None:
    _common(out)
    _experts(out)
    out.add_key_length(HEAD)
    out.add_value_length(HEAD)
    out.add_expert_shared_count(1)
    out.add_expert_weights_scale(1.0)
    out.add_expert_weights_norm(True)
    out.add_leading_dense_block_count(0)
    out.add_uint32("glm4moe.expert_gating_func", 2)
    out.add_uint32("glm4moe.nextn_predict_layers", 1)


def _drafting_layer(layer: int) -> Shapes:
    """A mixture of experts; the second of the two layers drafts tokens, and is not loaded."""
    shapes = ATTENTION | {k: v for k, v in EXPERTS.items() if "norm" not in k}
    shapes |= _weights(
        post_attention_norm=(WIDTH,),
        ffn_gate_shexp=(EXPERT_FFN, WIDTH),
        ffn_up_shexp=(EXPERT_FFN, WIDTH),
        ffn_down_shexp=(WIDTH, EXPERT_FFN),
    )
    shapes["exp_probs_b.bias"] = (N_EXPERTS,)
    names = {"eh_proj": (WIDTH, 2 * WIDTH)} | dict.fromkeys(
        ("enorm", "hnorm", "shared_head_norm"), (WIDTH,)
    )
    if layer == N_LAYERS - 1:
        shapes |= {f"nextn.{name}.weight": shape for name, shape in names.items()}
    return shapes


DRAFTING = Architecture("glm4moe", _drafting, _drafting_layer, UNTIED)


def _divisions(footprint: Footprint) -> list[Division]:
    return list(divisions(footprint.n_layers, footprint.expert_layers))


def _planned_by_llama(
    path: Path, divisions: Sequence[Division], shape: ContextShape
) -> list[dict[str, list[int]]]:
    """Return weights, cache and compute in both memories, for each division."""
    requests = [
        {
            "path": str(path),
            "n_gpu_layers": division.n_gpu_layers,
            "n_cpu_moe": division.n_cpu_moe,
            "n_ctx": shape.n_ctx * shape.n_seq,
            "n_seq": shape.n_seq,
            "type_k": shape.type_k,
            "type_v": shape.type_v,
        }
        for division in divisions
    ]
    done = subprocess.run(
        [sys.executable, gpu_stand_in.__file__],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == gpu_stand_in.UNKNOWN_LAYOUT:
        # The stand-in fills in structs of ggml's backends by the layout of tested versions.
        pytest.skip("this llama.cpp has other structs")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, list[int]]] = json.loads(done.stdout)
    return found


def _write_hollow_experts(path: Path) -> Path:
    """Write a mixture of experts of 4 layers, 1.2 GB of F16, as a header over a hole."""
    out = GGUFWriter(path, "qwen3moe")
    width, head, n_experts, hidden, n_vocab, n_layers = 1024, 128, 32, 512, 2000, 4
    out.add_context_length(4096)
    out.add_embedding_length(width)
    out.add_feed_forward_length(4096)
    out.add_block_count(n_layers)
    out.add_head_count(16)
    out.add_head_count_kv(4)
    out.add_key_length(head)
    out.add_value_length(head)
    out.add_rope_dimension_count(head)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_expert_count(n_experts)
    out.add_expert_used_count(4)
    out.add_expert_feed_forward_length(hidden)
    out.add_vocab_size(n_vocab)
    out.add_tokenizer_model("none")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (n_vocab, width), "output": (n_vocab, width), "output_norm": (width,)
    }  # fmt: skip
    for i in range(n_layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,), "ffn_norm": (width,), "attn_q_norm": (head,),
            "attn_k_norm": (head,), "attn_q": (16 * head, width), "attn_k": (4 * head, width),
            "attn_v": (4 * head, width), "attn_output": (width, 16 * head),
            "ffn_gate_inp": (n_experts, width), "ffn_gate_exps": (n_experts, hidden, width),
            "ffn_up_exps": (n_experts, hidden, width), "ffn_down_exps": (n_experts, width, hidden),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    n_bytes = 0
    for name, shape in shapes.items():
        kind = np.dtype(np.float32 if len(shape) == 1 or "inp" in name else np.float16)
        size = math.prod(shape) * kind.itemsize
        out.add_tensor_info(f"{name}.weight", shape, kind, size)
        n_bytes += padded(size, 32)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    out.close()
    with path.open("r+b") as file:
        file.truncate(padded(path.stat().st_size, 32) + n_bytes)
    return path


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, DRAFTING], ids=lambda a: a.name)
def test_weights_and_cache_of_every_division_are_those_of_llama_cpp(
    architecture: Architecture, tmp_path: Path
) -> None:
    source = write_small_model(tmp_path / "source.gguf", architecture)
    target = tmp_path / "target.gguf"
    types = planned_types(source, target)
    with open_gguf(source) as file, FootprintEstimator(file) as estimator:
        footprint = estimator.footprint(SHAPE, types)
    assert footprint.method == "llama.cpp"
    divisions = [s for s in _divisions(footprint) if s.n_gpu_layers > 0]
    assert len(divisions) >= 3
    real = _planned_by_llama(target, divisions, SHAPE)
    for division, found in zip(divisions, real, strict=True):
        placed = place(footprint, division)
        for name, use in (("ram", placed.ram), ("vram", placed.vram)):
            weights, cache, compute = found[name]
            # An encoder of texts has no head; its embedding is not kept twice, as is planned.
            more = footprint.output_copy if architecture.embeds and name == "vram" else 0
            assert use.weights - more == pytest.approx(weights, rel=0.001, abs=2048), division
            assert use.cache == pytest.approx(cache, rel=0.001), division
            # T5's two graphs hand over more.
            assert architecture.has_encoder or use.compute > 0.8 * compute, division


def test_experts_that_stay_in_ram_are_those_of_llama_cpp_and_one_is_copied(tmp_path: Path) -> None:
    path = _write_hollow_experts(tmp_path / "experts.gguf")
    with open_gguf(path) as file, FootprintEstimator(file) as estimator:
        footprint = estimator.footprint(SHAPE, {})
    divisions = [s for s in _divisions(footprint) if s.n_gpu_layers > 0]
    assert [s.n_cpu_moe for s in divisions[:5]] == [0, 1, 2, 3, 4]
    expert = 2 * 32 * 512 * 1024
    real = _planned_by_llama(path, divisions, SHAPE)
    for division, found in zip(divisions, real, strict=True):
        placed = place(footprint, division)
        for name, use in (("ram", placed.ram), ("vram", placed.vram)):
            weights, cache, compute = found[name]
            assert use.weights == pytest.approx(weights, rel=1e-4), division
            assert use.cache == cache, division
            assert use.compute > 0.95 * compute, division
        copied = 0 if division == Division(n_gpu_layers=5) else expert
        assert copied < found["vram"][2] < copied + 60_000_000, division
        assert placed.vram.compute < 1.6 * found["vram"][2], division


def test_a_plan_for_experts_in_ram_fits_both_memories_of_llama_cpp(tmp_path: Path) -> None:
    moe = next(a for a in ARCHITECTURES if a.name == "qwen3moe")
    source = write_small_model(tmp_path / "source.gguf", moe)
    with open_gguf(source) as file, FootprintEstimator(file) as estimator:
        most = place(estimator.footprint(SHAPE, {}), Division(n_gpu_layers=3))
    measurement = ramgguf.measure(source, threads=1)
    experts = sum(t.n_bytes for t in measurement.tensors if "_exps" in t.name)
    limits = {  # RAM takes experts, but not a layer's cache
        "ram": most.ram.total - most.ram.compute + most.vram.compute + experts // 2,
        "vram": most.vram.total - experts * 86 // 100,
    }
    request = ramgguf.MemoryRequest(SHAPE, limits["ram"], vram=limits["vram"])
    target = tmp_path / "target.gguf"
    made = ramgguf.quantize(
        source, ramgguf.MemoryLimit(request), target,
        min_sqnr_db=0, threads=1, verify=False, effort="fast",
    )  # fmt: skip
    division, memory = made.plan.division, made.plan.memory
    assert division is not None
    assert memory is not None
    assert memory.vram is not None
    assert memory.n_gpu_layers == division.n_gpu_layers
    (found,) = _planned_by_llama(target, [division], SHAPE)
    for name, use in (("ram", memory.ram), ("vram", memory.vram)):
        assert use.total <= limits[name]
        assert use.weights == pytest.approx(found[name][0], rel=0.001)
        assert sum(found[name]) + use.overhead <= limits[name]
    cpu_fast = set(formats.SETS["cpu-fast"])
    in_ram = [
        a.format
        for a in made.plan.assignments
        if is_kept_by_cpu_moe(a.name) and int(a.name.split(".")[1]) < division.n_cpu_moe
    ]
    assert division.n_cpu_moe > 0
    assert set(in_ram) <= cpu_fast
