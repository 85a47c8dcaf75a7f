"""Scales leave what a model computes, and make its quantization better."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from typer.testing import CliRunner

import ramgguf
from ramgguf.cli.app import app
from ramgguf.core import parallel
from ramgguf.core.errors import GGUFError, ImatrixError, PlanError
from ramgguf.core.progress import Silent
from ramgguf.gguf.architecture import is_multiplied, part_of
from ramgguf.gguf.folds import ARCHITECTURES as FOLDED
from ramgguf.gguf.folds import folds
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.gguf.writer import rewrite
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian, load_hessians
from ramgguf.quants.imatrix import Importance, InputSquares, load_imatrix, scaled, write_imatrix
from ramgguf.quants.scales import ScaledFile, Scales, load_scales
from ramgguf.transform import most_checks, scaling
from small_models import (
    ARCHITECTURES,
    EXPERT_FFN,
    MIXTURES,
    N_EXPERTS,
    Architecture,
    Stored,
    write_small_model,
)
from tiny_models import write_tiny_model


def _matrix(
    model: Path,
    path: Path,
    spread: float = 2.0,
    *,
    per_expert: bool = False,
    unused: tuple[int, ...] = (),
) -> Path:
    """Write a matrix in which inputs differ by orders of magnitude, at random.

    Experts have one entry for all, or one each; unused ones had no token.
    """
    rng = np.random.default_rng(5)

    def squares(tensor: TensorInfo) -> InputSquares:
        n = tensor.n_experts if per_expert else 1
        counts = np.ones(n, np.int64)
        counts[list(unused) if n > 1 else []] = 0
        values = np.exp(spread * rng.standard_normal((n, tensor.row_length)))
        return InputSquares(values * counts[:, None], counts)

    with open_gguf(model) as file:
        entries = {
            t.name: squares(t)
            for t in file.tensors
            if is_multiplied(t.name, t.shape, file.architecture, tied=file.has_tied_embedding)
        }
    write_imatrix(path, entries, dataset="made", n_chunks=1, chunk_size=1, force=True)
    return path


def _weights(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensor(name)
    rows = file.read_rows(tensor, 0, tensor.n_rows)
    return decode_rows(tensor.type_name, rows, tensor.row_length)


FOLDS = [a for a in (*ARCHITECTURES, *MIXTURES) if a.name in FOLDED]
QWEN3MOE = next(a for a in ARCHITECTURES if a.name == "qwen3moe")
MIXTRAL = next(a for a in MIXTURES if a.name == "llama")
LLAMA, MAMBA = (next(a for a in ARCHITECTURES if a.name == n) for n in ("llama", "mamba"))


@pytest.mark.parametrize("architecture", FOLDS, ids=lambda a: a.name)
def test_the_scaled_model_computes_the_same_in_llama_cpp(
    architecture: Architecture, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")

    def in_f32(name: str, x: np.ndarray) -> Stored | None:
        # In F16, rounding alone makes routers choose other experts now and then.
        return {name: (x, GGMLQuantizationType.F32)} if architecture.has_experts else None

    model = write_small_model(tmp_path / "m.gguf", architecture, tokenizer=True, stored=in_f32)
    imatrix = _matrix(model, tmp_path / "i.gguf", per_expert=True)
    found = ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1)
    scales = load_scales(found.path)
    assert max(float(s.max()) for s in scales.columns.values()) > 2
    assert found.kld is not None
    assert found.kld < 1e-5
    with open_gguf(model) as file:
        parts = Counter(part_of(t.name) for t in file.tensors)
        gates = ("ffn_gate", "ffn_gate_exps", "ffn_gate_shexp")
        # Two norms a layer, a gate for each kind of up and down, V where it is a matrix of its own.
        expected = 2 * (file.n_layers or 0) + sum(parts[p] for p in (*gates, "attn_v"))
        assert found.n_folds == expected


# With the weaker scales, a mixture departs no more than rounding may make it depart.
@pytest.mark.parametrize(("is_mixture", "strength"), [(False, 1), (True, 1), (True, 0.1)])
def test_a_scale_that_is_moved_wrongly_is_noticed(
    is_mixture: bool, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp")
    model = tmp_path / "m-f16.gguf"
    if is_mixture:
        write_small_model(model, QWEN3MOE, tokenizer=True)
    else:
        write_tiny_model(model, weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf")

    def wrong(file: GGUFFile) -> tuple[object, ...]:
        return tuple(f for f in folds(file) if "ffn_down" not in f.readers[0])[:1] + tuple(
            replace(f, row_of=f.row_of[::-1].copy())
            for f in folds(file)
            if "ffn_down" in f.readers[0]
        )

    monkeypatch.setattr(scaling, "folds", wrong)
    with pytest.raises(PlanError, match="computes something else"):
        ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=strength)
    assert not (tmp_path / "s.gguf").exists()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(("architecture", "most"), [(LLAMA, 1), (QWEN3MOE, 2), (MAMBA, 0)])
def test_the_scaled_model_runs_as_often_as_is_said_before(
    architecture: Architecture, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_small_model(tmp_path / "m.gguf", architecture)
    runs: list[object] = []

    def departs(*found: object, **_: object) -> float:
        runs.append(found)
        return scaling.CHOICES / 2  # as rounding may make a mixture depart

    monkeypatch.setattr(scaling, "_departure", departs)
    monkeypatch.setattr(scaling, "scores_here", lambda: True)
    with pytest.raises(PlanError, match=r"computes something else|no scale can move"):
        ramgguf.transform(model, tmp_path / "s.gguf", _matrix(model, tmp_path / "i.gguf"))
    with open_gguf(model) as file:
        assert len(runs) == most_checks(file) == most


def test_experts_that_are_chosen_otherwise_by_rounding_alone_are_no_reason_to_refuse(
    tmp_path: Path,
) -> None:
    pytest.importorskip("llama_cpp")

    def in_bf16(name: str, x: np.ndarray) -> Stored | None:
        if x.ndim == 1 or "ffn_gate_inp" in name:
            return None
        kind = GGMLQuantizationType.BF16
        return {name: (gguf.quants.quantize(x, kind), kind)}

    model = write_small_model(tmp_path / "m.gguf", MIXTRAL, tokenizer=True, stored=in_bf16)
    imatrix = _matrix(model, tmp_path / "i.gguf")
    said: list[str] = []
    found = ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1, announce=said.append)
    assert found.kld is not None
    assert found.kld > scaling.EXACT
    assert "rounding changes which experts" in said[0]


def test_scales_are_those_of_the_formula(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf", spread=0.5)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=0.8, check=False)
    scales, weighed = load_scales(tmp_path / "s.gguf"), load_imatrix(imatrix)
    with open_gguf(model) as file:
        down = "blk.1.ffn_down.weight"
        squares = (_weights(file, down).astype(np.float64) ** 2).sum(axis=0)
        expected = (weighed.entries[down].values[0] ** 0.8 / squares) ** (1 / 4)
        expected /= np.exp(np.log(expected).mean())
        assert np.allclose(scales.columns[down], expected, rtol=1e-5)
        up = "blk.1.ffn_up.weight"
        assert np.allclose(scales.rows[up], 1 / expected, rtol=1e-5)
        # Up is scaled by what it reads, as well.
        assert np.allclose(scales.columns[up], scales.columns["blk.1.ffn_gate.weight"])
        norm = scales.columns["blk.1.ffn_norm.weight"]
        assert np.allclose(norm * scales.columns[up], 1, rtol=1e-5)


@pytest.mark.parametrize("unused", [(), (0, 2)])
@pytest.mark.parametrize("per_expert", [True, False])
def test_each_expert_has_scales_of_its_own_for_up_and_down_and_all_share_the_norms(
    per_expert: bool, unused: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "CHUNK_WEIGHTS", 300 * 256)  # from one expert into the next
    model = write_small_model(tmp_path / "m.gguf", QWEN3MOE)
    imatrix = _matrix(model, tmp_path / "i.gguf", 0.5, per_expert=per_expert, unused=unused)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=0.8, check=False)
    scales, weighed = load_scales(tmp_path / "s.gguf"), load_imatrix(imatrix)
    with open_gguf(model) as file:
        names = {k: f"blk.1.ffn_{k}_exps.weight" for k in ("gate", "up", "down")}
        squares, d = {}, {}
        for key, name in names.items():
            shape = file.tensor(name).shape
            each = _weights(file, name).reshape(N_EXPERTS, -1, shape[0]).astype(np.float64)
            squares[key] = (each**2).sum(axis=1)
            found = weighed.importance(name, shape)
            assert found is not None
            d[key] = found.astype(np.float64)
        expected = (d["down"] ** 0.8 / squares["down"]) ** (1 / 4)
        expected /= np.exp(np.log(expected).mean(axis=1, keepdims=True))
        assert scales.columns[names["down"]].shape == (N_EXPERTS, EXPERT_FFN)
        assert np.allclose(scales.columns[names["down"]], expected, rtol=1e-5)
        assert np.allclose(scales.rows[names["up"]], 1 / expected.reshape(-1), rtol=1e-5)
        # The router is scaled like the experts' columns, and has no say in them.
        weights = sum(s.sum(axis=0) / s.sum() for s in (squares["gate"], squares["up"]))
        shared = (d["gate"].mean(axis=0) ** 0.8 / weights) ** (1 / 4)
        shared /= np.exp(np.log(shared).mean())
        for name in (names["gate"], names["up"], "blk.1.ffn_gate_inp.weight"):
            assert np.allclose(scales.columns[name], shared, rtol=1e-5)
        assert np.allclose(scales.columns["blk.1.ffn_norm.weight"], 1 / shared, rtol=1e-5)


def test_rows_of_experts_are_read_with_the_scales_of_their_expert(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "m.gguf", QWEN3MOE)
    imatrix = _matrix(model, tmp_path / "i.gguf", per_expert=True)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    scales = load_scales(tmp_path / "s.gguf")
    with open_gguf(model) as file:
        scaled = ScaledFile(file, scales)
        for name in ("blk.0.ffn_down_exps.weight", "blk.0.ffn_up_exps.weight"):
            tensor = file.tensor(name)
            per_expert = tensor.n_rows // N_EXPERTS
            w = _weights(file, name).reshape(N_EXPERTS, per_expert, tensor.row_length)
            columns = np.broadcast_to(scales.columns[name], (N_EXPERTS, tensor.row_length))
            rows = scales.rows.get(name, np.ones(tensor.n_rows, np.float32))
            expected = w * columns[:, None] * rows.reshape(N_EXPERTS, per_expert, 1)
            expected = expected.reshape(tensor.n_rows, -1)
            assert np.allclose(_weights(scaled, name), expected, rtol=2e-3, atol=1e-6)
            # From within an expert to within the one after the next.
            start, stop = per_expert - 3, 2 * per_expert + 5
            some = scaled.read_rows(tensor, start, stop)
            (same,), _ = scaled.read_ranges(
                [(tensor, start, stop)], lambda n: np.empty(n, np.uint8)
            )
            assert np.array_equal(some, same)
            found = decode_rows("F16", some, tensor.row_length)
            assert np.allclose(found, expected[start:stop], rtol=2e-3, atol=1e-6)


def test_scales_that_make_a_weight_too_large_for_its_type_are_refused(tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"
    with open_gguf(write_tiny_model(tmp_path / "m-f16.gguf", weight_type="F16")) as file:
        tensor, largest = file.tensor(name), np.abs(_weights(file, name)).max()
        for factor, fits in ((60_000 / largest, True), (70_000 / largest, False)):
            columns = np.full(tensor.row_length, factor, np.float32)
            scales = Scales(tmp_path / "s.gguf", {name: columns}, {}, file.sample_sha256)
            scaled = ScaledFile(file, scales)
            if fits:
                assert np.isfinite(_weights(scaled, name)).all()
                continue
            match = rf"m-f16.gguf: '{name}', scaled as .*s.gguf says: .* too large for F16"
            with pytest.raises(GGUFError, match=match):
                scaled.read_rows(tensor, 0, tensor.n_rows)


def test_matrices_of_experts_in_any_layout_are_those_of_the_scaled_inputs(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "m.gguf", QWEN3MOE)
    matrix = _matrix(model, tmp_path / "i.gguf", per_expert=True)
    ramgguf.transform(model, tmp_path / "s.gguf", matrix, check=False)
    scales, plain = load_scales(tmp_path / "s.gguf"), load_imatrix(matrix)
    with open_gguf(model) as file:
        for name in ("blk.0.ffn_down_exps.weight", "blk.0.ffn_gate_exps.weight"):
            tensor, values = file.tensor(name), plain.entries[name].values
            for layout in (values, values.reshape(1, -1), values[:1]):
                entries = {name: Importance(name, layout)}
                found = scaled(replace(plain, entries=entries), scales)
                expected = np.broadcast_to(
                    layout if layout is values[:1] else layout.reshape(-1, tensor.row_length),
                    values.shape,
                )
                after = found.importance(name, tensor.shape)
                assert after is not None
                assert np.allclose(after, expected / scales.columns[name] ** 2, rtol=1e-5)
        name = "blk.0.ffn_down_exps.weight"
        entries = {name: Importance(name, plain.entries[name].values[:3])}
        with pytest.raises(ImatrixError, match="has 1024 scales"):
            scaled(replace(plain, entries=entries), scales)


def test_down_of_experts_loses_less_with_the_scales_of_each(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "m.gguf", QWEN3MOE)
    imatrix = _matrix(model, tmp_path / "i.gguf", 1.0, per_expert=True)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    errors = []
    for scales in (None, tmp_path / "s.gguf"):
        made = ramgguf.quantize(
            model, "6bpw", tmp_path / f"{scales is None}.gguf", imatrix=imatrix, scales=scales,
            formats=["Q4_0"], pins=["blk=Q4_0"],
        )  # fmt: skip
        errors.append([a.nmse for a in made.plan.assignments if "ffn_down_exps" in a.name])
    ratios = np.array(errors[1]) / np.array(errors[0])
    assert len(ratios) == 2
    assert ratios.max() < 0.97


def test_what_reads_the_norm_before_experts_is_scaled_and_biases_of_routers_are_not(
    tmp_path: Path,
) -> None:
    found: dict[str, set[tuple[str, ...]]] = {}
    for name in ("qwen2moe", "glm4moe"):
        architecture = next(a for a in MIXTURES if a.name == name)
        model = write_small_model(tmp_path / f"{name}.gguf", architecture)
        with open_gguf(model) as file:
            layer = [f for f in folds(file) if f.readers[0].startswith("blk.1.")]
            found[name] = {tuple(part_of(n) for n in (*f.writers, "to", *f.readers)) for f in layer}
    feed_forward = tuple(f"ffn_{k}_{e}" for e in ("exps", "shexp") for k in ("gate", "up"))
    same = {
        ("attn_norm", "to", "attn_q", "attn_k", "attn_v"),
        ("attn_v", "attn_v.bias", "to", "attn_output"),
        ("ffn_up_exps", "to", "ffn_down_exps"),
        ("ffn_up_shexp", "to", "ffn_down_shexp"),
    }
    routers = ("ffn_gate_inp", "ffn_gate_inp_shexp")
    assert found["qwen2moe"] == same | {("ffn_norm", "to", *feed_forward, *routers)}
    norm = "post_attention_norm"
    assert found["glm4moe"] == same | {(norm, "to", *feed_forward, "ffn_gate_inp")}


def test_experts_whose_up_has_a_bias_keep_their_rows(tmp_path: Path) -> None:
    def with_bias(name: str, x: np.ndarray) -> Stored | None:
        if not name.endswith("ffn_up_exps.weight"):
            return None
        kind, bias = GGMLQuantizationType.F32, np.zeros(x.shape[:2], np.float32)
        return {name: (x, kind), name.replace("weight", "bias"): (bias, kind)}

    model = write_small_model(tmp_path / "m.gguf", MIXTRAL, stored=with_bias)
    with open_gguf(model) as file:
        assert {part_of(f.readers[0]) for f in folds(file)} == {
            *("attn_q", "attn_output", "ffn_gate_exps"),
        }


def test_heads_that_share_a_v_share_its_scales(tmp_path: Path) -> None:
    llama = next(a for a in ARCHITECTURES if a.name == "llama")
    model = write_small_model(tmp_path / "m.gguf", llama)
    with open_gguf(model) as file:
        fold = next(f for f in folds(file) if f.readers == ("blk.0.attn_output.weight",))
    # Four heads of 64, two of K and V: heads 0 and 1 read the first.
    assert fold.n_rows == 128
    assert fold.row_of[[0, 63, 64, 127, 128, 255]].tolist() == [0, 63, 0, 63, 64, 127]


def test_files_are_read_with_their_scales_and_hessians_are_of_the_scaled_inputs(
    tmp_path: Path,
) -> None:
    pytest.importorskip("llama_cpp")
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix, hessian = tmp_path / "i.gguf", tmp_path / "h.gguf"
    ramgguf.calibrate(model, imatrix, tokens="mix", n_sequences=2, n_ctx=64, hessian=hessian)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    scales = load_scales(tmp_path / "s.gguf")
    plain, scaled = load_imatrix(imatrix), load_imatrix(imatrix, hessian, scales.path)
    with open_gguf(model) as file:
        other = ScaledFile(file, scales)
        for name in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight"):
            tensor, s = file.tensor(name), scales.of_inputs(name)
            assert s is not None
            rows = scales.rows.get(name, np.ones(tensor.n_rows, np.float32))
            w = _weights(file, name)
            expected = (w * s * rows[:, None]).astype(np.float16).astype(np.float32)
            assert np.allclose(_weights(other, name), expected, rtol=2e-3, atol=1e-7)
            part = other.read_rows(tensor, 3, 9)
            assert np.array_equal(
                decode_rows("F16", part, tensor.row_length), _weights(other, name)[3:9]
            )
            before = plain.importance(name, tensor.shape)
            after = scaled.importance(name, tensor.shape)
            assert before is not None
            assert after is not None
            assert np.allclose(after, before / s**2, rtol=1e-5)
            gram = load_hessians(hessian).get(name, tensor.row_length)
            assert gram is not None
            assert scaled.hessians is not None
            found = scaled.hessians.factored(name, tensor.row_length)
            h = Hessian.of(gram, load_hessians(hessian).n_tokens)
            # The output's error is the same, whichever side the scales are on.
            e = np.random.default_rng(1).standard_normal((4, tensor.row_length)).astype(np.float32)
            assert np.allclose(found.errors(e * s), h.errors(e), rtol=1e-3)
            assert np.allclose(found.damped_errors(e * s), h.damped_errors(e), rtol=1e-3)
        assert other.sample_sha256 == file.sample_sha256
    assert scaled.source.identity == load_imatrix(imatrix, hessian).source.identity
    assert scaled.source.encoding != scaled.source.identity


@pytest.mark.parametrize("is_mixture", [False, True])
def test_a_file_quantized_with_scales_is_planned_verified_and_made_again(
    is_mixture: bool, tmp_path: Path
) -> None:
    model = tmp_path / "m-f16.gguf"
    if is_mixture:
        write_small_model(model, QWEN3MOE)
    else:
        write_tiny_model(model, weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf", per_expert=True)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    formats = ["Q8_0", "Q4_K"] if is_mixture else None
    made = ramgguf.quantize(
        model, "50%", tmp_path / "a.gguf", imatrix=imatrix, scales=tmp_path / "s.gguf",
        formats=formats,
    )  # fmt: skip
    assert made.worst_departure is not None
    assert made.worst_departure < 1e-4
    assert made.plan.imatrix is not None
    assert made.plan.imatrix.scales_path == str(tmp_path / "s.gguf")
    again = ramgguf.quantize(model, None, tmp_path / "b.gguf", from_plan=made.plan)
    assert again.paths[0].read_bytes() == made.paths[0].read_bytes()
    with pytest.raises(PlanError, match="without scales"):
        ramgguf.perturb(model, made.plan, tmp_path / "noisy.gguf")
    without = ramgguf.quantize(model, "50%", tmp_path / "c.gguf", imatrix=imatrix, formats=formats)
    assert without.plan.sha256() != made.plan.sha256()
    norm = "blk.0.attn_norm.weight"
    with open_gguf(model) as file, open_gguf(made.paths[0]) as out:
        scales = load_scales(tmp_path / "s.gguf")
        expected = _weights(file, norm) * scales.columns[norm]
        assert np.allclose(_weights(out, norm), expected, rtol=1e-6)


def test_a_model_whose_columns_differ_in_size_loses_less_with_scales(tmp_path: Path) -> None:
    """Columns are made unlike, inputs divided: scales find their way back."""
    even = write_tiny_model(tmp_path / "even-f16.gguf", weight_type="F16")
    ramgguf.transform(
        even,
        tmp_path / "moved.gguf",
        _matrix(even, tmp_path / "i.gguf", 3.0),
        strength=1,
        check=False,
    )
    moved = load_scales(tmp_path / "moved.gguf")
    model, imatrix = tmp_path / "uneven-f16.gguf", tmp_path / "j.gguf"
    with open_gguf(even) as file:
        scaled = ScaledFile(file, moved)
        layout = plan_layout(model, file, {t.name: t.type_name for t in file.tensors}, {})
        rewrite(layout, scaled, lambda _, rows: rows, stage="", threads=1, progress=Silent())
    entries = {
        name: InputSquares(1 / s[None].astype(np.float64) ** 2, np.array([1]))
        for name, s in moved.columns.items()
        if "norm" not in name
    }
    write_imatrix(imatrix, entries, dataset="made", n_chunks=1, chunk_size=1, force=True)
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, strength=1, check=False)
    back = load_scales(tmp_path / "s.gguf")
    for name in entries:
        product = back.columns[name] * moved.columns[name]
        assert (
            np.abs(np.log(product / product.mean())).max()
            < 0.5 * np.abs(np.log(moved.columns[name])).max()
        )
    errors = []
    for scales in (None, tmp_path / "s.gguf"):
        made = ramgguf.quantize(
            model, "6bpw", tmp_path / f"{scales is None}.gguf", imatrix=imatrix, scales=scales,
            formats=["Q4_0"], pins=["blk=Q4_0"],
        )  # fmt: skip
        errors.append([a.nmse for a in made.plan.assignments if a.name in entries])
    assert len(errors[0]) == 14
    ratios = np.array(errors[1]) / np.array(errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 0.8


def test_what_cannot_be_scaled_is_refused_by_name(tmp_path: Path) -> None:
    mamba = next(a for a in ARCHITECTURES if a.name == "mamba")
    other = write_small_model(tmp_path / "mamba.gguf", mamba)
    imatrix = _matrix(other, tmp_path / "i.gguf")
    with pytest.raises(PlanError, match="no scale can move in it: of the architecture mamba"):
        ramgguf.transform(other, tmp_path / "s.gguf", imatrix)
    quantized = write_tiny_model(tmp_path / "q8.gguf", weight_type="Q8_0")
    with pytest.raises(PlanError, match="no scale can move"):
        ramgguf.transform(quantized, tmp_path / "s.gguf", _matrix(quantized, tmp_path / "j.gguf"))
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "k.gguf")
    ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    with pytest.raises(GGUFError, match="exists"):
        ramgguf.transform(model, tmp_path / "s.gguf", imatrix, check=False)
    sibling = write_tiny_model(tmp_path / "sibling.gguf", weight_type="F16", seed=7)
    with pytest.raises(GGUFError, match="of another model"):
        ramgguf.quantize(sibling, "50%", imatrix=imatrix, scales=tmp_path / "s.gguf")
    with pytest.raises(ImatrixError, match="scales need the importance matrix"):
        ramgguf.quantize(model, "50%", scales=tmp_path / "s.gguf")
    with pytest.raises(ImatrixError, match=r"general\.type"):
        load_scales(imatrix)
    with pytest.raises(PlanError, match="strength"):
        ramgguf.transform(model, tmp_path / "t.gguf", imatrix, strength=-1)


def test_scales_that_were_changed_since_the_plan_are_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix, scales = _matrix(model, tmp_path / "i.gguf"), tmp_path / "s.gguf"
    ramgguf.transform(model, scales, imatrix, check=False)
    made = ramgguf.quantize(model, "50%", tmp_path / "a.gguf", imatrix=imatrix, scales=scales)
    ramgguf.transform(model, scales, imatrix, check=False, strength=1, force=True)
    with pytest.raises(ImatrixError, match=r"s\.gguf: is another file"):
        ramgguf.quantize(model, None, tmp_path / "b.gguf", from_plan=made.plan)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    imatrix = _matrix(model, tmp_path / "i.gguf")
    arguments = ["transform", str(model), "--imatrix", str(imatrix), "--no-check", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert Path(said["path"]) == tmp_path / "tiny-f16.scales.gguf"
    assert said["n_folds"] == 8
    quantize = ["quantize", str(model), "--budget", "50%", "--imatrix", str(imatrix)]
    done = CliRunner().invoke(app, [*quantize, "--scales", said["path"], "--no-score", "-q"])
    assert done.exit_code == 0, done.output
