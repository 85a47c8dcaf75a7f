"""Roles by name, and the list of tensors that are never quantized: llama.cpp is the oracle."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import TENSOR_NAMES

from ramgguf.gguf.architecture import layer_of, never_quantized, role_of

_NAMES = sorted(
    {name.replace("{bid}", "7") + ".weight" for name in TENSOR_NAMES.values()}
    | {
        "a.rvq.codebook.0.weight",
        "blk.7.attn_q.bias",
        "blk.7.attn_sinks",
        "blk.7.exp_probs_b.bias",
        "blk.7.ffn_gate_tid2eid.weight",
        "blk.7.indexer.k_proj.weight",
        "blk.7.indexer.q_proj.weight",
        "mm.a.code_embd.weight",
        "token_types.weight",
        "v.blk.7.attn_q.rel_pos",
    }
)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd.weight", "embedding"),
        ("per_layer_token_embd.weight", "embedding"),
        ("output.weight", "head"),
        ("output_norm.weight", "norm"),
        ("blk.0.attn_norm.weight", "norm"),
        ("blk.0.attn_norm_2.weight", "norm"),
        ("blk.0.attn_q_norm.weight", "norm"),
        ("blk.0.ssm_norm.weight", "norm"),
        ("blk.0.time_mix_ln.weight", "norm"),
        ("blk.0.attn_norm.bias", "norm"),
        ("blk.0.attn_q.weight", "attn_q"),
        ("blk.0.attn_q.bias", "bias"),
        ("blk.0.attn_qkv.weight", "attn_qkv"),
        ("blk.0.attn_output.weight", "attn_output"),
        ("enc.blk.0.attn_o.weight", "attn_output"),
        ("dec.blk.11.cross_attn_v.weight", "cross_attn_v"),
        ("blk.0.attn_kv_b.weight", "attn_kv"),
        ("blk.0.attn_q_a.weight", "attn_q"),
        ("blk.12.ffn_down.weight", "ffn_down"),
        ("blk.12.ffn_gate_exps.weight", "ffn_gate_exps"),
        ("blk.12.ffn_up_shexp.weight", "ffn_up_shexp"),
        ("blk.12.ffn_gate_inp.weight", "router"),
        ("blk.0.ssm_in.weight", "ssm_in"),
        ("blk.0.time_mix_key.weight", "time_mix_key"),
        ("blk.0.shortconv.in_proj.weight", "shortconv.in_proj"),
        ("blk.0.nextn.shared_head_head.weight", "head"),
        ("rope_freqs.weight", "other"),
        ("blk.0.attn_sinks", "other"),
        ("", "other"),
        ("weight", "other"),
        ("...", "other"),
    ],
)
def test_roles_are_told_from_names(name: str, role: str) -> None:
    assert role_of(name, "llama") == role


def test_layers_are_told_from_names() -> None:
    assert layer_of("blk.12.ffn_down.weight") == 12
    assert layer_of("enc.blk.3.attn_o.weight") == 3
    assert layer_of("output.weight") is None
    assert layer_of("blk.x.ffn_down.weight") is None


def test_trailing_ones_are_no_dimensions() -> None:
    assert never_quantized("blk.0.ffn_up.weight", (256, 1)) == "one-dimensional"
    assert never_quantized("blk.0.ffn_up.weight", (256, 1, 1, 1)) == "one-dimensional"
    assert never_quantized("blk.0.ffn_up.weight", (256, 1, 2)) is None
    assert never_quantized("blk.0.ffn_up.weight", (256, 1, 1, 2)) == "four-dimensional"


def test_llama_quantize_leaves_the_same_tensors_alone(
    tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source, target = tmp_path / "names.gguf", tmp_path / "quantized.gguf"
    out = GGUFWriter(source, "llama")
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(256)
    out.add_feed_forward_length(256)
    out.add_head_count(4)
    out.add_layer_norm_rms_eps(1e-5)
    rows = np.random.default_rng(1).standard_normal((2, 2, 256)).astype(np.float16)
    for name in _NAMES:
        out.add_tensor(name, rows[0])
    out.add_tensor("vector.weight", rows[0, 0])
    out.add_tensor("one_row.weight", rows[0, :1])
    out.add_tensor("three_dimensions.weight", rows)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.nthread = 1
    assert not llama_cpp.llama_model_quantize(bytes(source), bytes(target), params)
    kept = {t.name for t in GGUFReader(target).tensors if t.tensor_type.name != "Q8_0"}
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in GGUFReader(target).tensors}
    assert kept == {name for name, shape in shapes.items() if never_quantized(name, shape, "llama")}
    assert 80 < len(kept) < len(shapes) - 200
