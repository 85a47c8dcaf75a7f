"""Roles by name, and the list of tensors that are never quantized: llama.cpp is the oracle."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import MODEL_ARCH, MODEL_TENSORS, TENSOR_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from gguf_samples import finish_gguf
from ramgguf.gguf.architecture import (
    PARTS,
    draft_layers,
    has_tied_embedding,
    is_input,
    is_looked_up,
    layer_of,
    never_quantized,
    parse_name,
    part_of,
    role_of,
    sharers,
    trunk_layers,
)

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


_ALL = [name.replace("{bid}", "7") + ".weight" for name in TENSOR_NAMES.values()]


def test_every_part_of_the_table_is_a_name_that_gguf_or_llama_cpp_has() -> None:
    known = {part_of(name) for name in _ALL}
    newer = {"ffn_gate_up", "ffn_gate_tid2eid", "attn_out"}
    assert set(PARTS) - newer <= known
    assert {p for part in PARTS.values() for p in part.fuses} <= set(PARTS)


def test_names_of_every_architecture_are_taken_apart_and_put_together() -> None:
    for arch, tensors in MODEL_TENSORS.items():
        name_map = get_tensor_name_map(arch, 8)
        names = {
            f"{found}.weight"
            for kind, found in name_map.mapping.values()
            if kind in tensors and "{" not in found
        }
        assert len(names) > 10 or arch is MODEL_ARCH.MMPROJ
        for name in names:
            parsed = parse_name(name)
            assert f"{parsed.block}{parsed.part}.{parsed.kind}" == name
            for other in sharers(name):
                assert layer_of(other) == layer_of(name) is not None
                assert name in sharers(other)


def test_what_reads_the_same_is_told_from_names() -> None:
    def of(name: str) -> set[str]:
        return {other.removesuffix(".weight") for other in sharers(f"{name}.weight")}

    q = of("blk.3.attn_q")
    assert {"blk.3.attn_k", "blk.3.attn_v", "blk.3.attn_qkv", "blk.3.attn_kv_a_mqa"} <= q
    assert of("blk.3.ffn_gate") == {"blk.3.ffn_up", "blk.3.ffn_gate_up"}
    assert of("blk.3.ffn_up_exps") == {"blk.3.ffn_gate_exps", "blk.3.ffn_gate_up_exps"}
    assert of("blk.3.ffn_up_shexp") == {"blk.3.ffn_gate_shexp"}
    assert of("dec.blk.3.cross_attn_k") == {"dec.blk.3.cross_attn_v"}
    for alone in ("blk.3.attn_output", "blk.3.ffn_down", "blk.3.attn_q_b", "blk.3.attn_v_b",
                  "dec.blk.3.cross_attn_q", "token_embd", "output"):  # fmt: skip
        assert of(alone) == set()
    assert sharers("blk.3.attn_q.bias") == ()


def test_embeddings_are_looked_up_unless_they_are_the_head() -> None:
    gemma3n = ["token_embd.weight", "per_layer_token_embd.weight", "blk.0.attn_q.weight"]
    assert has_tied_embedding(gemma3n)
    assert not has_tied_embedding([*gemma3n, "output.weight"])
    assert not has_tied_embedding(["per_layer_token_embd.weight"])
    # The head of a draft block is not that of the trunk.
    assert has_tied_embedding(["token_embd.weight", "blk.9.nextn.shared_head_head.weight"])
    assert role_of("token_embd.weight", tied=True) == "tied_embedding"
    for name in ("per_layer_token_embd.weight", "blk.9.nextn.embed_tokens.weight"):
        assert role_of(name, "gemma3n", tied=True) == "embedding"
        assert is_looked_up(name, tied=True)
    assert not is_looked_up("token_embd.weight", tied=True)
    assert is_looked_up("token_embd.weight", tied=False)
    assert not is_looked_up("blk.0.attn_q.weight", tied=False)
    assert is_input("per_layer_token_embd.weight")
    assert not is_input("output.weight")
    assert not is_input("blk.9.nextn.embed_tokens.weight")


@pytest.mark.parametrize(
    ("layers", "drafts", "n_blocks", "n_draft", "expected"),
    [
        (8, [], 8, 0, 8),
        (9, [8], 9, 1, 8),
        (9, [8], 9, 0, 8),  # the key is missing
        (8, [], 9, 1, 8),  # the draft block was left out of the file
        (9, [8], None, 0, 8),
        (10, [8, 9], 10, 2, 8),
        (8, [], None, 0, 8),
        (0, [], None, 0, None),
        (3, [], 3, 7, 0),
    ],
)
def test_draft_blocks_are_not_of_the_trunk(
    layers: int, drafts: list[int], n_blocks: int | None, n_draft: int, expected: int | None
) -> None:
    names = [f"blk.{i}.ffn_down.weight" for i in range(layers)]
    names += [f"blk.{i}.nextn.eh_proj.weight" for i in drafts]
    assert trunk_layers(names, n_blocks, n_draft) == expected
    assert draft_layers(names) == set(drafts)


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
    finish_gguf(out)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.nthread = 1
    assert not llama_cpp.llama_model_quantize(bytes(source), bytes(target), params)
    kept = {t.name for t in GGUFReader(target).tensors if t.tensor_type.name != "Q8_0"}
    shapes = {t.name: tuple(int(n) for n in t.shape) for t in GGUFReader(target).tensors}
    assert kept == {name for name, shape in shapes.items() if never_quantized(name, shape, "llama")}
    assert 80 < len(kept) < len(shapes) - 200
