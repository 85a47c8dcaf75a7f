"""Sources that are quantized already, and weights that lie on a block format's grid."""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ggml_oracle
import ramgguf
from gguf_samples import ARCHITECTURE, U32, File, Key, Tensor, finish_gguf
from model_outputs import outputs
from ramgguf import _core
from ramgguf.core.errors import FormatError
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.candidates import is_source
from ramgguf.quants import formats, grids
from ramgguf.quants.encoders import EncoderName, libggml
from small_models import ARCHITECTURES, Stored, write_small_model

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
UP, GATE, NORM = "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_norm.weight"


def _write(path: Path, tensors: Mapping[str, tuple[NDArray[Any], Kind]]) -> Path:
    """Write a model of tensors that are stored as given: floats, or bytes of rows of a type."""
    out = GGUFWriter(path, "llama")
    out.add_block_count(1)
    for name, (data, kind) in tensors.items():
        out.add_tensor(name, data, raw_dtype=kind)
    finish_gguf(out)
    return path


def _write_quantized(path: Path, name: str, rows: Bytes) -> Path:
    """Write a model with a tensor of these blocks and one in F16, also in types gguf lacks."""
    gate = _gaussian(32, 512, seed=1).astype(np.float16)
    data = rows.tobytes() + bytes(-rows.nbytes % 32)
    tensors = (
        Tensor(UP, (512, 32), formats.get(name).type_id, 0),
        Tensor(GATE, (512, 32), Kind.F16, len(data)),
    )
    n_layers = Key("llama.block_count", U32, struct.pack("<I", 1))
    path.write_bytes(File((ARCHITECTURE, n_layers), tensors, data + gate.tobytes()).bytes())
    return path


def _gaussian(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _encoded(name: str, weights: Floats) -> Bytes:
    if name in formats.SOURCES_ONLY:
        return ggml_oracle.quantize(name, weights)
    if not formats.get(name).encodable:
        return libggml.encode(name, weights, np.ones(weights.shape[1], np.float32))
    rows = np.empty((len(weights), formats.row_bytes(name, weights.shape[1])), np.uint8)
    _core.encode(name, "F32", weights.view(np.uint8), rows, encoder="search")
    return rows


def _stored(weights: Floats, kind: str) -> NDArray[Any]:
    """Return the weights in a floating-point type, BF16 as bytes, rounded to nearest even."""
    if kind == "F32":
        return weights
    if kind == "F16":
        return weights.astype(np.float16)
    rows = np.empty((len(weights), 2 * weights.shape[1]), np.uint8)
    _core.encode("BF16", "F32", weights.view(np.uint8), rows)
    return rows


def _decoded(path: Path, name: str) -> Floats:
    tensor = next(t for t in GGUFReader(path).tensors if t.name == name)
    weights: Floats = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1]))
    return weights


SOURCES = [*formats.quantized(), *formats.by_libggml()]


def test_sources_are_all_types_that_ggml_decodes() -> None:
    decoding = ggml_oracle.decoding_types()
    assert {"MXFP4", "Q4_0", "Q6_K", "IQ4_XS", "IQ1_M"} <= decoding
    assert decoding == {name for name in formats.known() if is_source(name)}


@pytest.mark.parametrize("name", SOURCES)
def test_every_type_that_decodes_is_a_source_when_asked_for(name: str, tmp_path: Path) -> None:
    if not (formats.get(name).encodable or libggml.decodes(name)):
        pytest.skip("needs libggml")
    rows = _encoded(name, _gaussian(32, 512))
    source = _write_quantized(tmp_path / "a.gguf", name, rows)
    plain = ramgguf.measure(source, threads=1)
    assert [p.format for p in plain.tensors[0].points] == [name]
    assert f"already quantized to {name} (--allow-requantize" in (plain.tensors[0].kept or "")
    measured = ramgguf.measure(source, allow_requantize=True, threads=1)
    points = {p.format: p for p in measured.tensors[0].points}
    own = points.pop(name)
    assert own.nmse == 0
    assert own.n_bytes == rows.nbytes
    assert all(p.n_bytes < own.n_bytes for p in points.values())  # never made larger
    if not points:
        assert formats.row_bytes(name, 512) <= min(
            formats.row_bytes(f, 512) for f in formats.offered() if f not in formats.TERNARY
        )
        return
    least = min(points.values(), key=lambda p: p.n_bytes)
    made = ramgguf.quantize(
        source,
        "1000%",
        tmp_path / "b.gguf",
        allow_requantize=True,
        pins=[f"ffn_up={least.format}"],
        min_sqnr_db=0,
        effort="fast",
        threads=1,
    )
    assert made.worst_departure is not None
    in_gguf = name in Kind.__members__
    before = dequantize(rows, Kind[name]) if in_gguf else ggml_oracle.dequantize(name, rows, 512)
    after = _decoded(made.paths[0], UP)
    nmse = float(((before - after) ** 2).sum() / (before**2).sum())
    assert made.plan.assignments[0].nmse == pytest.approx(nmse, rel=1e-4)
    assert (nmse > 0) != (name == "TQ2_0" and least.format == "TQ1_0")  # which holds it exactly


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("grid", grids.GRIDS)
def test_weights_on_a_grid_are_kept_at_its_bytes_and_never_larger(
    grid: str, stored: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    n_blocks = 64 * 512 // 32
    # All codes alike likely: a block's largest weight has any of them.
    if grid == "Q4_0":
        scales = (rng.uniform(1e-3, 0.1, n_blocks) * rng.choice([-1, 1], n_blocks)).astype("<f2")
        head = scales.view(np.uint8).reshape(-1, 2)
    else:
        head = rng.integers(112, 126, (n_blocks, 1)).astype(np.uint8)
    codes = rng.integers(0, 256, (n_blocks, 16)).astype(np.uint8)
    rows = np.ascontiguousarray(np.concatenate([head, codes], axis=1)).reshape(64, -1)
    weights = np.empty((64, 512), np.float32)
    _core.decode(grid, rows, weights)
    tensors = {
        UP: (_stored(weights, stored), Kind[stored]),
        GATE: (_stored(_gaussian(64, 512), stored), Kind[stored]),
    }
    source = _write(tmp_path / "a.gguf", tensors)
    measured = ramgguf.measure(source, threads=1)
    up, gate = measured.tensors
    assert (up.grid, gate.grid) == (grid, None)
    assert any(
        f"on the grid of {grid} " in note and ": 1 tensor, with no" in note
        for note in measured.notes
    )
    made = ramgguf.quantize(source, "1000%", tmp_path / "b.gguf", effort="fast", threads=1)
    assert [a.format for a in made.plan.assignments] == [grid, stored]
    assert made.plan.assignments[0].n_bytes == rows.nbytes
    assert made.plan.assignments[0].is_exact
    back = _decoded(made.paths[0], UP)
    assert np.array_equal(grids.rounded(back, stored), grids.rounded(weights, stored))


@pytest.mark.parametrize("encoder", ["rtn", "search"])
def test_a_frontier_s_plan_and_noise_keep_weights_on_a_grid_too(
    tmp_path: Path, encoder: EncoderName
) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-6, 7, (64, 16, 32)).astype(np.float32)
    scales = rng.uniform(1e-3, 0.1, codes.shape[:2]).astype(np.float16).astype(np.float32)
    weights = (codes * scales[..., None]).reshape(64, 512).astype(np.float16)
    tensors = {UP: (weights, Kind.F16), GATE: (_gaussian(64, 512).astype(np.float16), Kind.F16)}
    source = _write(tmp_path / "a.gguf", tensors)
    frontier = ramgguf.curve(ramgguf.measure(source, encoder=encoder, threads=1), min_sqnr_db=0)
    plan = ramgguf.plan(frontier, frontier.steps[-1].n_bytes)
    up = next(a for a in plan.assignments if a.name == UP)
    assert (up.format, up.is_exact) == ("Q4_0", True)
    made = ramgguf.quantize(source, output=tmp_path / "b.gguf", from_plan=plan, threads=1)
    assert np.array_equal(_decoded(made.paths[0], UP).astype(np.float16), weights)
    noisy = _decoded(ramgguf.perturb(source, plan, tmp_path / "n.gguf", threads=1), UP)
    error = (
        np.square(noisy - weights, dtype=np.float64).sum()
        / np.square(weights, dtype=np.float64).sum()
    )
    assert error <= 4 * up.nmse + 1e-12


def test_a_minimum_of_bits_makes_no_tensor_on_a_grid_larger(tmp_path: Path) -> None:
    weights = np.empty((32, 512), np.float32)
    _core.decode("MXFP4", _encoded("MXFP4", _gaussian(32, 512)), weights)
    source = _write(
        tmp_path / "a.gguf",
        {UP: (_stored(weights, "BF16"), Kind.BF16), GATE: (_gaussian(32, 512), Kind.F32)},
    )
    plan = ramgguf.plan(
        ramgguf.measure(source, threads=1), "1000%",
        min_formats=["ffn_up=Q8_0", "ffn_gate=Q8_0"], min_sqnr_db=0,
    )  # fmt: skip
    assert plan.assignments[0].format == "MXFP4"
    assert plan.assignments[1].format == "F32"


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_dequantized_int4_is_kept_exactly_in_q4_0(group: int, stored: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(group)
    codes = rng.integers(-7, 8, (64, 512 // group, group)).astype(np.float32)
    # As quantizers make them: -7 to 7 about 0, a scale for each group, in 16 bits of their own.
    scales = grids.rounded(rng.uniform(1e-3, 0.1, codes.shape[:2]).astype(np.float32), "BF16")
    weights = grids.rounded((codes * scales[..., None]).reshape(64, 512), stored)
    source = _write(tmp_path / "a.gguf", {UP: (_stored(weights, stored), Kind[stored])})
    (tensor,) = ramgguf.measure(source, threads=1).tensors
    assert tensor.grid == "Q4_0"
    made = ramgguf.quantize(source, "99%", tmp_path / "b.gguf", effort="fast", threads=1)
    assert made.plan.assignments[0].is_exact
    back = _decoded(made.paths[0], UP)
    assert np.array_equal(grids.rounded(back, stored), weights)


def test_formats_that_were_asked_for_are_all_that_a_grid_may_have(tmp_path: Path) -> None:
    rows = _encoded("MXFP4", _gaussian(32, 512))
    weights = np.empty((32, 512), np.float32)
    _core.decode("MXFP4", rows, weights)
    source = _write(tmp_path / "a.gguf", {UP: (weights, Kind.F32)})
    (asked,) = ramgguf.measure(source, formats=["Q8_0", "Q4_K"], threads=1).tensors
    assert asked.grid is None
    measured = ramgguf.measure(source, threads=1)
    assert "MXFP4" in measured.formats
    limited = ramgguf.plan(measured, "1000%", formats=["Q8_0", "Q4_K"])
    assert limited.assignments[0].format == "F32"
    smaller = ramgguf.plan(measured, "11%", min_sqnr_db=0)  # a grid may still be left for less
    assert smaller.assignments[0].format != "MXFP4"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("grid", grids.GRIDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_named_on_a_grid_as_elsewhere(
    tmp_path: Path, grid: str, value: float
) -> None:
    weights = np.empty((64, 512), np.float32)
    _core.decode(grid, _encoded(grid, _gaussian(64, 512)), weights)
    weights[40, 7] = value
    source = _write(tmp_path / "a.gguf", {UP: (weights, Kind.F32)})
    with pytest.raises(FormatError, match=rf"{UP}\[{40 * 512 + 7}\] is NaN or infinite"):
        ramgguf.measure(source, threads=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["F32", "F16", "BF16"]))
def test_one_weight_off_the_grid_takes_a_tensor_off_it(seed: int, stored: str) -> None:
    rng = np.random.default_rng(seed)
    weights = np.empty((2, 64), np.float32)
    _core.decode("Q4_0", _encoded("Q4_0", rng.standard_normal((2, 64), dtype=np.float32)), weights)
    weights = grids.rounded(weights, stored)
    assert grids.exact_blocks("Q4_0", weights, stored) is not None
    place = int(rng.integers(0, weights.size))
    weights.reshape(-1)[place] += np.float32(0.37 * np.abs(weights).max())
    off = grids.rounded(weights, stored)
    blocks = grids.exact_blocks("Q4_0", off, stored)
    if blocks is not None:  # it may lie on another grid; then it is held exactly
        back = np.empty_like(off)
        _core.decode("Q4_0", blocks, back)
        assert np.array_equal(grids.rounded(back, stored), off)


def test_a_zero_tensor_and_other_rows_lie_on_no_grid(tmp_path: Path) -> None:
    tensors = {
        UP: (np.zeros((8, 64), np.float16), Kind.F16),
        GATE: (np.ones((8, 48), np.float16), Kind.F16),
    }
    source = _write(tmp_path / "a.gguf", tensors)
    with open_gguf(source) as file:
        assert [grids.grid_of(file, t) for t in file.tensors] == [None, None]


# --- NVFP4, whose tensors have a scale each, and Q1_0 ---

LLAMA = next(a for a in ARCHITECTURES if a.name == "llama")
needs_nvfp4 = pytest.mark.skipif(
    not libggml.decodes("NVFP4") or "NVFP4" not in Kind.__members__,
    reason="needs a libggml and a gguf package that have NVFP4",
)

needs_q1_0 = pytest.mark.skipif(not libggml.decodes("Q1_0"), reason="needs a libggml that has Q1_0")


def _nvfp4(name: str, x: Floats) -> Stored | None:
    """Return a matrix in NVFP4 with the scale that puts its largest block scale at 448."""
    if x.ndim < 2 or name == "token_embd.weight":
        return None
    scale = np.abs(x).max() / np.float32(6 * 448)
    blocks = ggml_oracle.quantize("NVFP4", x / scale)
    beside = name.removesuffix("weight") + "scale"
    return {name: (blocks, Kind.NVFP4), beside: (np.array([scale], np.float32), Kind.F32)}


@needs_nvfp4
def test_a_model_in_nvfp4_is_requantized_and_llama_cpp_still_applies_its_scales(
    tmp_path: Path,
) -> None:
    llama_cpp: ModuleType = pytest.importorskip("llama_cpp")
    source = write_small_model(tmp_path / "source.gguf", LLAMA, stored=_nvfp4)
    made = ramgguf.quantize(
        source, "99%", tmp_path / "made.gguf", allow_requantize=True, formats=["IQ4_XS"],
        pins=["ffn|attn=IQ4_XS"], min_sqnr_db=0, effort="fast", threads=1,
    )  # fmt: skip
    given = {a.name: a.format for a in made.plan.assignments}
    assert given["blk.1.ffn_down.weight"] == "IQ4_XS"
    assert given["output.weight"] == "NVFP4"  # llama.cpp reads its scale with NVFP4 only
    assert given["blk.1.ffn_down.scale"] == "F32"
    before, after = (outputs(llama_cpp, p, LLAMA) for p in (source, made.paths[0]))
    assert np.corrcoef(before, after)[0, 1] > 0.97
    assert np.abs(after).max() < 2 * np.abs(before).max()  # scales are some 1/500


@needs_nvfp4
def test_squares_of_weights_with_a_scale_are_those_of_the_scaled_weights(tmp_path: Path) -> None:
    plain = write_small_model(tmp_path / "plain.gguf", LLAMA)
    source = write_small_model(tmp_path / "source.gguf", LLAMA, stored=_nvfp4)
    expected = {t.name: t.sum_squares for t in ramgguf.measure(plain, threads=1).tensors}
    for t in ramgguf.measure(source, allow_requantize=True, threads=1).tensors:
        if t.source_format == "NVFP4" and t.kept is None:
            assert t.sum_squares == pytest.approx(expected[t.name], rel=0.02)


def test_nvfp4_is_refused_as_a_target_by_name(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.gguf", {UP: (_gaussian(8, 512), Kind.F32)})
    with pytest.raises(FormatError, match=r"NVFP4 is a source only .*MXFP4, IQ4_XS and Q4_K"):
        ramgguf.measure(source, formats=["NVFP4", "Q4_K"])


@needs_q1_0
@pytest.mark.parametrize("columns", [384, 512])
def test_a_sign_per_weight_is_a_format_when_asked_for_by_name(columns: int, tmp_path: Path) -> None:
    weights = _gaussian(600, columns)  # more rows than a sample has
    source = _write(tmp_path / "a.gguf", {UP: (weights, Kind.F32), GATE: (weights, Kind.F32)})
    assert not any(
        p.format == "Q1_0" for t in ramgguf.measure(source, threads=1).tensors for p in t.points
    )
    made = ramgguf.quantize(
        source, "5%", tmp_path / "b.gguf", formats=["Q1_0", "Q4_0"], min_sqnr_db=0, effort="fast",
        threads=1,
    )  # fmt: skip
    assert [a.format for a in made.plan.assignments] == ["Q1_0", "Q1_0"]
    assert made.worst_departure is not None
    with open_gguf(made.paths[0]) as file:
        blocks = file.read_rows(file.tensor(UP), 0, 600)
    assert np.array_equal(blocks, libggml.encode("Q1_0", weights, None))
    assert made.plan.assignments[0].nmse == pytest.approx(1 - 2 / np.pi, rel=0.03)


@needs_q1_0
def test_llama_cpp_loads_a_model_with_a_sign_per_weight(tmp_path: Path) -> None:
    llama_cpp: ModuleType = pytest.importorskip("llama_cpp")
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    made = ramgguf.quantize(
        source, "99%", tmp_path / "made.gguf", formats=["Q1_0", "Q8_0"], pins=["ffn_up=Q1_0"],
        min_sqnr_db=0, effort="fast", threads=1,
    )  # fmt: skip
    assert {a.format for a in made.plan.assignments if "ffn_up" in a.name} == {"Q1_0"}
    before, after = (outputs(llama_cpp, p, LLAMA) for p in (source, made.paths[0]))
    assert 0.5 < np.corrcoef(before, after)[0, 1] < 1 - 1e-6
