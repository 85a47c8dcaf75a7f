"""Formats of few bits, from an importance matrix or ternary weights to what llama.cpp computes."""

from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import ramgguf
from gguf_samples import finish_gguf
from model_outputs import outputs
from ramgguf.core.errors import FormatError, GGUFError
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.measure.candidates import suited, tried
from ramgguf.quantize import verify as stage
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders import EncoderName, libggml, points
from ramgguf.quants.hessian import gram_name, new_hessians
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.quants.row_samples import MOST_ROWS, measure_sample, sampled_rows
from small_models import ARCHITECTURES, write_small_model

LLAMA, MOE = (next(a for a in ARCHITECTURES if a.name == name) for name in ("llama", "qwen3moe"))
WITHOUT_ENTRY = ("token_embd.weight", "output.weight")

needs_libggml = pytest.mark.skipif(
    not libggml.is_installed(), reason="needs libggml of llama-cpp-python"
)


def write_imatrix(path: Path, model: Path) -> Path:
    """Write importance for the matrices of the model, as llama-imatrix does: none at its ends."""
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    with open_gguf(model) as file:
        for t in file.tensors:
            if len(t.shape) < 2 or t.name in WITHOUT_ENTRY:
                continue
            n_experts = t.shape[2] if len(t.shape) == 3 else 1
            values = np.exp(rng.standard_normal((n_experts, t.row_length))).astype(np.float32)
            writer.add_tensor(f"{t.name}.in_sum2", values)
            writer.add_tensor(f"{t.name}.counts", np.ones((n_experts, 1), np.float32))
    finish_gguf(writer)
    return path


def write_hessians(path: Path, model: Path) -> Path:
    """Write Hessians of inputs that go together, for the weights that write_imatrix knows."""
    rng = np.random.default_rng(6)
    with open_gguf(model) as file:
        sizes = {
            t.name: t.row_length
            for t in file.tensors
            if len(t.shape) == 2 and t.name not in WITHOUT_ENTRY
        }
    with new_hessians(path, {n: n for n in sizes}, sizes, 1000, force=True) as out:
        for name, n in sizes.items():
            x = rng.standard_normal((1000, n // 8)) @ rng.standard_normal((n // 8, n))
            x += 0.3 * rng.standard_normal(x.shape)
            out.write(gram_name(name), (x.T @ x).astype(np.float32))
        out.commit()
    return path


def make_ternary(path: Path) -> Path:
    """Round the matrices of a model of F16 to -d, 0 and d per row, in place."""
    with open_gguf(path) as file:
        places = [(t.offset, t.n_bytes, t.row_length) for t in file.tensors if len(t.shape) == 2]
    data = bytearray(path.read_bytes())
    for offset, n_bytes, row_length in places:
        x = np.frombuffer(data, np.float16, n_bytes // 2, offset).reshape(-1, row_length)
        d = np.abs(x.astype(np.float32)).mean(axis=1, keepdims=True).astype(np.float16)
        x[:] = np.clip(np.round(x / d), -1, 1) * d
    path.write_bytes(data)
    return path


def similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@needs_libggml
@pytest.mark.parametrize("architecture", [LLAMA, MOE], ids=lambda a: a.name)
def test_a_small_budget_with_a_matrix_takes_formats_of_points_and_of_libggml(
    architecture: object, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    chosen = LLAMA if architecture is LLAMA else MOE
    source = write_small_model(tmp_path / "source.gguf", chosen)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", source)
    made = ramgguf.quantize(
        source, "2.2bpw", tmp_path / "target.gguf", imatrix=imatrix, objective="activation",
        min_sqnr_db=0, threads=2,
    )  # fmt: skip
    given = {a.name: a.format for a in made.plan.assignments}
    sampled = {name for name, f in given.items() if f in formats.with_importance()}
    assert len(sampled) >= 2
    assert sum(f in points.FORMATS for f in given.values()) > 5
    assert not sampled & set(WITHOUT_ENTRY)
    assert made.worst_departure == pytest.approx(0, abs=1e-9)
    expected = outputs(llama_cpp, source, chosen)
    found = outputs(llama_cpp, made.paths[0], chosen)
    assert np.isfinite(found).all()
    assert 0.35 < similarity(found, expected) < 1 - 1e-6


@needs_libggml
@pytest.mark.parametrize("name", [*formats.with_importance(), "IQ3_S", "MXFP4", "Q2_0"])
def test_llama_cpp_loads_models_of_the_format(
    name: str, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", source)
    made = ramgguf.quantize(
        source,
        "99%",
        tmp_path / "target.gguf",
        imatrix=imatrix,
        formats=[name],
        pins=[rf"blk\..*(attn_[qkv]|attn_output|ffn_(up|gate|down)).weight={name}"],
        encoder="search",
        min_sqnr_db=0,
    )
    assert sum(a.format == name for a in made.plan.assignments) == 14
    found = outputs(llama_cpp, made.paths[0], LLAMA)
    expected = outputs(llama_cpp, source, LLAMA)
    assert np.isfinite(found).all()
    assert 0.3 < similarity(found, expected) < 1 - 1e-6


@pytest.mark.parametrize("imatrix", [False, True])
def test_a_ternary_model_is_held_exactly(
    imatrix: bool, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source = make_ternary(write_small_model(tmp_path / "source.gguf", LLAMA))
    weighed = write_imatrix(tmp_path / "imatrix.gguf", source) if imatrix else None
    made = ramgguf.quantize(source, "2bpw", tmp_path / "target.gguf", imatrix=weighed)
    assert {a.format for a in made.plan.assignments} == {"F32", "TQ1_0"}
    assert sum(a.nmse for a in made.plan.assignments) == 0
    found = outputs(llama_cpp, made.paths[0], LLAMA)
    assert similarity(found, outputs(llama_cpp, source, LLAMA)) > 0.99


def test_no_ternary_format_is_offered_for_other_weights(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    by_default = ramgguf.measure(source)
    points = {p.format for t in by_default.tensors for p in t.points}
    assert not points & set(formats.TERNARY)
    assert "IQ3_S" in points
    assert not any(name in t.excluded for t in by_default.tensors for name in formats.TERNARY)
    asked = ramgguf.measure(source, formats=["TQ2_0", "Q4_K"])
    reasons = {t.excluded["TQ2_0"] for t in asked.tensors if t.kept is None}
    assert reasons == {"its weights are not ternary"}


def test_a_tensor_that_is_ternary_in_its_first_row_only_has_no_ternary_point(
    tmp_path: Path,
) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    data = bytearray(source.read_bytes())
    with open_gguf(source) as file:
        offset = file.tensor("blk.0.ffn_up.weight").offset
    np.frombuffer(data, np.float16, 256, offset)[:] = 0.5
    source.write_bytes(data)
    measured = ramgguf.measure(source, formats=["TQ2_0", "Q4_K"])
    tensor = next(t for t in measured.tensors if t.name == "blk.0.ffn_up.weight")
    assert {p.format for p in tensor.points} == {"F16", "Q4_K"}


def test_formats_that_need_a_matrix_are_refused_without_one(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    with pytest.raises(FormatError, match=r"IQ1_M cannot be encoded without an importance matrix"):
        ramgguf.measure(source, formats=["IQ1_M", "Q4_K"])
    assert not set(tried(None, None)) & set(formats.with_importance())


@needs_libggml
def test_a_tensor_without_an_entry_has_none_of_these_formats(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", source)
    measured = ramgguf.measure(source, imatrix=imatrix)
    for t in measured.tensors:
        found = {p.format: p for p in t.points if p.format in formats.with_importance()}
        if t.name in WITHOUT_ENTRY:
            assert not found
            assert t.excluded["IQ1_M"] == "the importance matrix has no entry for it"
        elif t.kept is None:
            assert set(found) == set(formats.with_importance())
            nmses = [p.nmse for p in sorted(found.values(), key=lambda p: p.n_bytes)]
            assert nmses == sorted(nmses, reverse=True)
            assert all(0 <= p.nmse_error < 0.1 * p.nmse for p in found.values())


def test_with_a_hessian_all_rows_are_measured_and_none_is_sampled(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    scale = ErrorWeights(np.ones((1, 256), np.float32), 512, lambda: pytest.fail("not needed"))
    with open_gguf(source) as file:
        tensor = file.tensor("blk.0.ffn_up.weight")
        found = suited(file, tensor, scale, ("IQ1_M", "Q4_K"), tell_ternary=False)
    assert (found.measured, found.sampled) == (("IQ1_M", "Q4_K"), ())
    assert not found.excluded


@needs_libggml
@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS", "IQ1_S", "IQ1_M"])
def test_error_feedback_is_planned_written_and_verified_in_formats_of_points(
    name: str, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", source)
    hessian = write_hessians(tmp_path / "hessian.gguf", source)
    ways: tuple[EncoderName, ...] = ("search", "gptq")
    errors = {}
    for encoder in ways:
        made = ramgguf.quantize(
            source, "99%", tmp_path / f"{encoder}.gguf", encoder=encoder, imatrix=imatrix,
            hessian=hessian, formats=[name], pins=[rf"blk\..*(attn_[qkv]|ffn_up).weight={name}"],
            min_sqnr_db=0, threads=1,
        )  # fmt: skip
        assert made.worst_departure == pytest.approx(0, abs=1e-9)
        errors[encoder] = [a.nmse for a in made.plan.assignments if a.format == name]
        assert np.isfinite(outputs(llama_cpp, made.paths[0], LLAMA)).all()
    assert len(errors["gptq"]) >= 8
    assert sum(errors["gptq"]) < 0.7 * sum(errors["search"])


@needs_libggml
def test_the_standard_error_is_that_of_the_sample(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(1)
    spread = np.exp(0.5 * rng.standard_normal((2048, 1)))
    x = (rng.standard_t(3, (2048, 256)) * spread).astype(np.float32)
    writer.add_tensor("blk.0.ffn_up.weight", x)
    finish_gguf(writer)
    w = np.exp(rng.standard_normal((1, 256))).astype(np.float32)
    with open_gguf(tmp_path / "model.gguf") as file:
        tensor = file.tensor("blk.0.ffn_up.weight")
        found = measure_sample(file, tensor, ErrorWeights(w, 2048), "IQ1_M")
    q = libggml.decode("IQ1_M", libggml.encode("IQ1_M", x, w[0]), 256)
    x64 = x.astype(np.float64)
    errors, squares = ((x64 - q) ** 2) @ w[0], (x64**2) @ w[0]
    whole = errors.sum() / squares.sum()
    rows = sampled_rows(2048, 256, 1)
    assert len(rows) == 256
    assert found.nmse == pytest.approx(errors[rows].sum() / squares[rows].sum())
    assert 0.2 * found.standard_error < abs(found.nmse - whole) + found.standard_error
    assert abs(found.nmse - whole) < 3 * found.standard_error
    # Against the spread of samples drawn at random.
    drawn = [rng.choice(2048, 256, replace=False) for _ in range(300)]
    spread_of = np.std([errors[d].sum() / squares[d].sum() for d in drawn])
    assert found.standard_error == pytest.approx(spread_of, rel=0.5)


@pytest.mark.parametrize(
    ("n_rows", "row_length", "n_experts"),
    [(1, 256, 1), (7, 256, 1), (4096, 4096, 1), (128 * 768, 2048, 128), (1024 * 8, 512, 1024)],
)
def test_samples_are_few_rows_of_every_part(n_rows: int, row_length: int, n_experts: int) -> None:
    rows = sampled_rows(n_rows, row_length, n_experts)
    assert 0 < len(rows) <= MOST_ROWS
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < n_rows
    experts = set((rows // (n_rows // n_experts)).tolist())
    assert len(experts) == min(n_experts, MOST_ROWS)


@needs_libggml
def test_a_sampled_tensor_that_was_written_otherwise_is_found_out(tmp_path: Path) -> None:
    source = write_small_model(tmp_path / "source.gguf", LLAMA)
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", source)
    made = ramgguf.quantize(
        source,
        "99%",
        tmp_path / "target.gguf",
        imatrix=imatrix,
        formats=["IQ1_M"],
        pins=["ffn_up=IQ1_M"],
        min_sqnr_db=0,
    )
    (target,) = made.paths
    with open_gguf(target) as file:
        tensor = file.tensor("blk.0.ffn_up.weight")
    data = bytearray(target.read_bytes())
    for i in range(tensor.offset, tensor.offset + tensor.n_bytes, 56):
        data[i + 55] ^= 0x10  # the exponent of every scale
    target.write_bytes(data)
    with (
        open_gguf(source) as file,
        open_gguf(target) as written,
        pytest.raises(GGUFError, match=r"blk\.0\.ffn_up\.weight"),
    ):
        stage.verify(file, made.plan, written, threads=1, progress=Silent())
    assert made.plan.imatrix is not None
    assert load_imatrix(imatrix).source.sha256 == made.plan.imatrix.sha256
