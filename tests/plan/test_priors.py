"""Priors of tensors by name and shape: those of real architectures, whose names are gguf's."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, GGUFWriter
from gguf.constants import TENSOR_NAMES

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.gguf.architecture import role_of
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.priors import DEPTH_PRIORS, PART_PRIORS, ModelShape, prior
from synthetic import SOURCE

D, HEADS, HEAD, FFN = 2048, 16, 128, 8192


def _tensor(name: str, shape: tuple[int, ...], arch: str, *, tied: bool) -> TensorMeasurement:
    n = math.prod(shape)
    return TensorMeasurement(
        name=name,
        shape=shape,
        role=role_of(name, arch, tied=tied),
        layer=int(name.split(".")[1]) if name.startswith("blk.") else None,
        source_format="F16",
        n_bytes=2 * n,
        sum_squares=1.0,
        max_abs=1.0,
        excess_kurtosis=0.0,
        points=(Point(format="F16", n_bytes=2 * n, nmse=0.0, max_error=0.0),),
    )


def _model(
    parts: Mapping[str, tuple[int, ...]],
    *,
    outside: tuple[str, ...] = ("token_embd", "output"),
    n_layers: int = 8,
    n_blocks: int | None = None,
    arch: str = "llama",
    extra: Mapping[str, tuple[int, ...]] | None = None,
) -> Measurement:
    """Return a measurement of n_layers blocks of these parts, and of what is outside of them."""
    shapes: dict[str, tuple[int, ...]] = {f"{part}.weight": (D, 32000) for part in outside}
    shapes |= {
        f"blk.{i}.{part}.weight": shape for i in range(n_layers) for part, shape in parts.items()
    }
    shapes |= {f"{name}.weight": shape for name, shape in (extra or {}).items()}
    tied = "output" not in outside
    return Measurement(
        ramgguf_version="0",
        source=SOURCE.model_copy(update={"architecture": arch}),
        encoder="rtn",
        formats=(),
        n_overhead_bytes=0,
        alignment=32,
        n_layers=n_blocks or n_layers,
        tensors=tuple(_tensor(name, shape, arch, tied=tied) for name, shape in shapes.items()),
    )


def _priors(measurement: Measurement) -> dict[str, float]:
    shape = ModelShape.of(measurement)
    return {t.name.removesuffix(".weight"): prior(t, shape) for t in measurement.tensors}


def _cost(measurement: Measurement, layer: int, *parts: str) -> float:
    """Return n · π of these parts of a layer: their cost at an NMSE of 1."""
    shape = ModelShape.of(measurement)
    names = {f"blk.{layer}.{part}.weight" for part in parts}
    found = [t for t in measurement.tensors if t.name in names]
    assert len(found) == len(parts)
    return sum(t.n_weights * prior(t, shape) for t in found)


DENSE = {
    "attn_q": (D, HEADS * HEAD),
    "attn_k": (D, HEADS * HEAD // 4),
    "attn_v": (D, HEADS * HEAD // 4),
    "attn_output": (HEADS * HEAD, D),
    "ffn_gate": (D, FFN),
    "ffn_up": (D, FFN),
    "ffn_down": (FFN, D),
}


def test_priors_depend_on_role_heads_and_depth() -> None:
    of = _priors(_model(DENSE))
    assert of["blk.4.attn_v"] == pytest.approx(0.8 * 4 * PART_PRIORS["attn_v"])
    assert of["blk.4.attn_k"] == pytest.approx(0.8 * 4 * PART_PRIORS["attn_k"])
    assert of["blk.4.attn_q"] == pytest.approx(0.8 * PART_PRIORS["attn_q"])
    down = [of[f"blk.{i}.ffn_down"] / PART_PRIORS["ffn_down"] for i in range(8)]
    # Between the two ends: the first third has two of the four layers, the others one each.
    assert down == pytest.approx([7.5, 2.5, 1.4, 1.4, 0.8, 0.7, 1.4, 4.4])
    assert (of["token_embd"], of["output"]) == (0.35, 1.2)
    assert _priors(_model(DENSE, outside=("token_embd",)))["token_embd"] == 1.2


@pytest.mark.parametrize("n_layers", range(1, 9))
def test_every_depth_has_a_factor_and_shallow_models_the_larger_one(n_layers: int) -> None:
    of = _priors(_model(DENSE, n_layers=n_layers))
    down = [of[f"blk.{i}.ffn_down"] / PART_PRIORS["ffn_down"] for i in range(n_layers)]
    assert down[0] == pytest.approx(7.5)
    assert down[-1] == pytest.approx(7.5 if n_layers == 1 else 4.4)
    assert min(down) >= 0.7


def test_experts_have_the_priors_of_dense_matrices() -> None:
    experts = {"ffn_down_exps": (FFN, D, 4), "ffn_down_shexp": (FFN, D), "ffn_down": (FFN, D)}
    of = _priors(_model(experts))
    for i in (0, 4, 7):
        assert of[f"blk.{i}.ffn_down_exps"] == of[f"blk.{i}.ffn_down"]
        assert of[f"blk.{i}.ffn_down_shexp"] == of[f"blk.{i}.ffn_down"]


def test_what_has_no_prior_of_its_own_counts_as_a_gate_in_the_middle() -> None:
    of = _priors(_model({"ssm_in": (D, D), "nobody_knows": (D, D)}))
    assert set(of.values()) == {1.0, PART_PRIORS["token_embd"], PART_PRIORS["output"]}
    assert of["blk.3.ssm_in"] == of["blk.3.nobody_knows"] == 1


@pytest.mark.parametrize("layer", range(8))
@pytest.mark.parametrize("suffix", ["", "_exps"])
def test_fused_gate_and_up_cost_what_they_cost_apart(layer: int, suffix: str) -> None:
    more = (4,) if suffix else ()
    apart = _model({f"ffn_gate{suffix}": (D, FFN, *more), f"ffn_up{suffix}": (D, FFN, *more)})
    fused = _model({f"ffn_gate_up{suffix}": (D, 2 * FFN, *more)})
    expected = _cost(apart, layer, f"ffn_gate{suffix}", f"ffn_up{suffix}")
    assert _cost(fused, layer, f"ffn_gate_up{suffix}") == pytest.approx(expected)
    assert _cost(fused, 7, f"ffn_gate_up{suffix}") > 3 * _cost(fused, 4, f"ffn_gate_up{suffix}")


@pytest.mark.parametrize("arch", ["phi3", "glm4", "chatglm"])
def test_an_ffn_up_that_holds_the_gate_counts_as_both(arch: str) -> None:
    fused = {"ffn_up": (D, 2 * FFN)}
    up, gate = PART_PRIORS["ffn_up"], PART_PRIORS["ffn_gate"]
    both = _priors(_model(fused, arch=arch))["blk.4.ffn_up"]
    assert both == pytest.approx(0.8 * (up + gate) / 2)
    assert _priors(_model(fused))["blk.4.ffn_up"] == pytest.approx(0.8 * up) != both


@pytest.mark.parametrize("n_groups", [1, 2, 4, 16])
def test_fused_qkv_costs_what_its_parts_cost_apart(n_groups: int) -> None:
    kv = HEADS * HEAD // n_groups
    output = {"attn_output": (HEADS * HEAD, D)}
    apart = _model({"attn_q": (D, HEADS * HEAD), "attn_k": (D, kv), "attn_v": (D, kv), **output})
    fused = _model({"attn_qkv": (D, HEADS * HEAD + 2 * kv), **output})
    expected = _cost(apart, 4, "attn_q", "attn_k", "attn_v")
    assert _cost(fused, 4, "attn_qkv") == pytest.approx(expected)


# Of DeepSeek-V2 and V3: the ranks of Q, and of K and V with the rotary part beside.
Q_RANK, KV_RANK, ROPE = 1536, 512, 64
MLA = {
    "attn_q_a": (D, Q_RANK),
    "attn_q_b": (Q_RANK, HEADS * (HEAD + ROPE)),
    "attn_kv_a_mqa": (D, KV_RANK + ROPE),
    "attn_output": (HEADS * HEAD, D),
}
SPLIT = {"attn_k_b": (HEAD, KV_RANK, HEADS), "attn_v_b": (KV_RANK, HEAD, HEADS)}
WHOLE = {"attn_kv_b": (KV_RANK, 2 * HEADS * HEAD)}


@pytest.mark.parametrize("kv", [SPLIT, WHOLE], ids=["split", "whole"])
def test_factors_of_latent_attention_cost_what_the_full_matrices_would(
    kv: Mapping[str, tuple[int, ...]],
) -> None:
    # With as many heads of K and V as of Q, and of Q's rows only those that K has, too.
    full = _model({"attn_k": (D, HEADS * HEAD), "attn_v": (D, HEADS * HEAD), "attn_q": (D, D)})
    expected = _cost(full, 4, "attn_k", "attn_v")
    per_weight = PART_PRIORS["attn_q"] * 0.8
    latent = _model({**MLA, **kv})
    assert _cost(latent, 4, *kv) == pytest.approx(expected)
    assert _cost(latent, 4, "attn_kv_a_mqa") == pytest.approx(expected)
    q = per_weight * D * HEADS * (HEAD + ROPE)
    assert _cost(latent, 4, "attn_q_a") == pytest.approx(q)
    assert _cost(latent, 4, "attn_q_b") == pytest.approx(q)
    of = _priors(latent)
    assert of["blk.4.attn_kv_a_mqa"] > 10
    if "attn_v_b" in kv:
        assert of["blk.4.attn_v_b"] / of["blk.4.attn_k_b"] == pytest.approx(
            PART_PRIORS["attn_v"] / PART_PRIORS["attn_k"]
        )


DRAFT = {
    "blk.8.nextn.eh_proj": (2 * D, D),
    "blk.8.nextn.embed_tokens": (D, 32000),
    "blk.8.nextn.shared_head_head": (D, 32000),
    **{f"blk.8.{part}": shape for part, shape in DENSE.items()},
}


@pytest.mark.parametrize("n_blocks", [9, 8], ids=["blocks counted", "trunk counted"])
def test_a_draft_block_is_not_the_last_layer_and_the_last_of_the_trunk_is(n_blocks: int) -> None:
    plain = _priors(_model(DENSE))
    drafting = _priors(_model(DENSE, n_blocks=n_blocks, extra=DRAFT))
    assert {k: v for k, v in drafting.items() if k in plain} == plain
    for part in DENSE:
        # Protective: as the layers between the ends that matter most.
        assert drafting[f"blk.8.{part}"] == max(plain[f"blk.{i}.{part}"] for i in range(2, 6))
        assert drafting[f"blk.8.{part}"] > plain[f"blk.4.{part}"]
    assert drafting["blk.8.nextn.shared_head_head"] == drafting["output"]


def test_a_draft_block_that_only_the_metadata_tell_has_no_ends() -> None:
    found = _priors(_model(DENSE, n_layers=9, n_blocks=8))  # the trunk has 8 of 9 layers
    assert found["blk.7.ffn_down"] == 4.4 * PART_PRIORS["ffn_down"]
    assert found["blk.8.ffn_down"] == found["blk.2.ffn_down"] == 1.4 * PART_PRIORS["ffn_down"]


def test_a_file_with_a_draft_block_is_measured_and_read_up_to_its_trunk(tmp_path: Path) -> None:
    from ramgguf.sensitivity.alpha import _strided

    out = GGUFWriter(tmp_path / "draft.gguf", "glm4moe")
    out.add_block_count(9)
    out.add_uint32("glm4moe.nextn_predict_layers", 1)
    rows = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float16)
    names = [f"blk.{i}.ffn_down.weight" for i in range(9)]
    for name in ("token_embd.weight", "output.weight", *names, "blk.8.nextn.eh_proj.weight"):
        out.add_tensor(name, rows)
    finish_gguf(out)
    measured = ramgguf.measure(tmp_path / "draft.gguf", formats=["Q8_0"])
    assert measured.n_layers == 8
    of = _priors(measured)
    assert of["blk.7.ffn_down"] == 4.4 * PART_PRIORS["ffn_down"]
    assert of["blk.8.ffn_down"] == 1.4 * PART_PRIORS["ffn_down"]
    with open_gguf(tmp_path / "draft.gguf") as file:
        read = [t.name for t in _strided(file, file.tensors, 3)]
    wanted = ["token_embd.weight", "output.weight", *(names[i] for i in (0, 1, 2, 5, 6, 7))]
    assert sorted(read) == sorted(wanted)


def test_embeddings_by_layer_are_no_tied_embedding() -> None:
    measured = _model(
        DENSE,
        outside=("token_embd", "per_layer_token_embd"),
        arch="gemma3n",
    )
    of = _priors(measured)
    assert (of["token_embd"], of["per_layer_token_embd"]) == (1.2, 1.0)
    roles = {t.name: t.role for t in measured.tensors}
    assert roles["token_embd.weight"] == "tied_embedding"
    assert roles["per_layer_token_embd.weight"] == "embedding"


# What is quantized and has a prior of 1 for want of anything known.
_UNMEASURED = (
    *("ssm_", "time_mix_", "channel_mix_", "shortconv.", "vis_", "indexer.", "nextn."),
    *("cross_attn_", "enc.", "dec.", "convnext.", "posnet.", "cls", "altup", "laurel"),
)


@pytest.mark.parametrize("arch", list(MODEL_ARCH), ids=lambda a: MODEL_ARCH_NAMES[a])
def test_feed_forward_and_attention_of_every_architecture_have_priors(arch: MODEL_ARCH) -> None:
    names = [TENSOR_NAMES[t] for t in MODEL_TENSORS[arch]]
    parts = {n.removeprefix("blk.{bid}."): (D, D) for n in names if n.startswith("blk.{bid}.")}
    parts = {n: s for n, s in parts.items() if not n.startswith(_UNMEASURED)}
    measured = _model(parts, arch=MODEL_ARCH_NAMES[arch])
    of = _priors(measured)
    for part in parts:
        middle, last = of[f"blk.4.{part}"], of[f"blk.7.{part}"]
        if part.startswith("ffn_") and part.removeprefix("ffn_").startswith(("gate", "up", "down")):
            if role_of(f"blk.4.{part}.weight") != "router":
                assert last > middle != 1.0, part
        elif part.startswith(("attn_k", "attn_v", "attn_qkv")) and "norm" not in part:
            assert middle != 1.0, part


def test_every_depth_factor_belongs_to_a_part_with_a_prior() -> None:
    assert set(DEPTH_PRIORS) <= set(PART_PRIORS)
    for d in DEPTH_PRIORS.values():
        assert min(d.first, d.second) >= 1
        assert min(d.second_last, d.last, *d.thirds) >= 0.5
    assert DEPTH_PRIORS["ffn_down"].last > 4


def test_priors_are_the_geometric_means_of_what_two_families_showed() -> None:
    results = Path(__file__).parents[2] / "bench" / "results" / "priors.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    heads_per_kv = {"smol768": 4, "qwen05": 7}
    medians: dict[str, list[float]] = defaultdict(list)
    for model, heads in heads_per_kv.items():
        found: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if (row["part"], row.get("model"), row.get("origin")) == ("alpha", model, "measured"):
                sharing = heads if row["role"] in ("attn_k", "attn_v") else 1
                role = "output" if row["role"] in ("head", "tied_embedding") else row["role"]
                found[role].append(row["alpha_per_weight"] / sharing)
        gate = float(np.median(found["ffn_gate"]))
        for role, values in found.items():
            medians[role].append(float(np.median(values)) / gate)
    both = {role: math.sqrt(math.prod(values)) for role, values in medians.items() if values[1:]}
    assert set(both) == {
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output"
    }  # fmt: skip
    for role, value in both.items():
        assert PART_PRIORS[role] == pytest.approx(value, rel=0.06), role
