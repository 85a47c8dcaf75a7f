"""Quantizing with an importance matrix, from its file to the output's metadata."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray

import ramgguf
from gguf_samples import finish_gguf
from ramgguf import _core
from ramgguf.core.errors import ImatrixError
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.imatrix import load_imatrix

Floats = NDArray[np.float32]
DENSE, EXPERTS = "blk.0.ffn_up.weight", "blk.0.ffn_down_exps.weight"


@dataclass(frozen=True)
class Case:
    """A model of two weights, and an importance matrix for both."""

    model: Path
    imatrix: Path
    dense: Floats
    experts: Floats
    importance: dict[str, Floats]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    rng = np.random.default_rng(3)
    dense = rng.standard_normal((64, 512)).astype(np.float32)
    experts = rng.standard_normal((3, 32, 256)).astype(np.float32)
    importance = {
        DENSE: np.exp(rng.standard_normal((1, 512))).astype(np.float32),
        EXPERTS: np.exp(2 * rng.standard_normal((3, 256))).astype(np.float32),
    }
    model = GGUFWriter(tmp_path / "model.gguf", "llama")
    model.add_block_count(1)
    model.add_tensor(DENSE, dense)
    model.add_tensor(EXPERTS, experts)
    matrix = GGUFWriter(tmp_path / "imatrix.gguf", "llama")
    matrix.add_type("imatrix")
    matrix.add_array("imatrix.datasets", ["wiki.txt"])
    matrix.add_uint32("imatrix.chunk_count", 9)
    for name, values in importance.items():
        matrix.add_tensor(f"{name}.in_sum2", 4 * values)
        matrix.add_tensor(f"{name}.counts", np.full((len(values), 1), 4, np.float32))
    for writer in (model, matrix):
        finish_gguf(writer)
    return Case(tmp_path / "model.gguf", tmp_path / "imatrix.gguf", dense, experts, importance)


def decoded(path: Path, name: str) -> Floats:
    tensor = next(t for t in GGUFReader(path).tensors if t.name == name)
    values: Floats = dequantize(tensor.data, tensor.tensor_type)
    return values.reshape(tuple(reversed(tensor.shape.tolist())))


def weighted_nmse(x: Floats, q: Floats, w: Floats) -> float:
    """Return Σ w(x−q)² / Σ w x²; w broadcasts against x."""
    x64 = x.astype(np.float64)
    return float((w * (x64 - q) ** 2).sum() / (w * x64**2).sum())


def test_planned_errors_are_the_weighted_ones_of_what_is_written(case: Case) -> None:
    made = ramgguf.quantize(case.model, "4.6bpw", imatrix=case.imatrix)
    assert made.worst_departure == pytest.approx(0, abs=1e-12)
    found = {a.name: a.nmse for a in made.plan.assignments}
    (path,) = made.paths
    dense = weighted_nmse(case.dense, decoded(path, DENSE), case.importance[DENSE])
    w = case.importance[EXPERTS][:, None, :]
    experts = weighted_nmse(case.experts, decoded(path, EXPERTS), w)
    assert found[DENSE] == pytest.approx(dense, rel=1e-4)
    assert found[EXPERTS] == pytest.approx(experts, rel=1e-4)


def test_importance_lowers_the_weighted_error_at_the_same_bytes(case: Case) -> None:
    def quantized(name: str, imatrix: Path | None) -> Path:
        made = ramgguf.quantize(
            case.model,
            "5bpw",
            case.model.with_name(name),
            encoder="search",
            imatrix=imatrix,
            formats=["Q4_K"],
            min_sqnr_db=0,
        )
        return made.paths[0]

    plain, weighed = quantized("a.gguf", None), quantized("b.gguf", case.imatrix)
    for name, x in ((DENSE, case.dense), (EXPERTS, case.experts)):
        w = case.importance[name][:, None, :] if name == EXPERTS else case.importance[name]
        before = weighted_nmse(x, decoded(plain, name), w)
        after = weighted_nmse(x, decoded(weighed, name), w)
        assert 0.3 * before < after < 0.98 * before


def test_the_output_says_which_matrix_it_was_made_with(case: Case) -> None:
    made = ramgguf.quantize(case.model, "4.6bpw", imatrix=case.imatrix)
    assert made.n_bytes == made.plan.n_bytes
    with open_gguf(made.paths[0]) as file:
        assert file.metadata["quantize.imatrix.file"] == str(case.imatrix)
        assert file.metadata["quantize.imatrix.dataset"] == "wiki.txt"
        assert file.metadata["quantize.imatrix.entries_count"] == 2
        assert file.metadata["quantize.imatrix.chunks_count"] == 9


def test_a_plan_loads_its_matrix_again_and_refuses_another(case: Case) -> None:
    made = ramgguf.quantize(case.model, "4.6bpw", imatrix=case.imatrix)
    again = ramgguf.quantize(
        case.model, from_plan=made.plan, output=case.model.with_name("again.gguf")
    )
    assert made.paths[0].read_bytes() == again.paths[0].read_bytes()
    case.imatrix.write_bytes(case.imatrix.read_bytes() + b"\0")
    with pytest.raises(ImatrixError, match="another file than the plan was made with"):
        ramgguf.quantize(case.model, from_plan=made.plan, force=True)


def test_plans_with_and_without_a_matrix_have_other_hashes(case: Case) -> None:
    made = ramgguf.quantize(case.model, "4.6bpw", imatrix=case.imatrix)
    without = made.plan.model_copy(update={"imatrix": None})
    assert made.plan.sha256() != without.sha256()


def test_a_matrix_of_another_model_is_refused_by_name(case: Case) -> None:
    matrix = load_imatrix(case.imatrix)
    with pytest.raises(ImatrixError, match=r"'blk\.0\.ffn_up\.weight' has 512"):
        matrix.importance(DENSE, (256, 64))


@pytest.mark.parametrize("start", [0, 5, 31, 32])
def test_rows_are_weighed_by_their_own_expert(case: Case, start: int) -> None:
    with open_gguf(case.model) as file:
        tensor = file.tensor(EXPERTS)
        scale = ErrorWeights.of(tensor, load_imatrix(case.imatrix))
        rows = file.read_rows(tensor, start, 90)
    blocks = scale.encode("Q4_K", "F32", rows, start, 256, "search")
    for row in range(start, 90):
        w = case.importance[EXPERTS][row // 32]
        one = np.empty((1, blocks.shape[1]), np.uint8)
        _core.encode(
            "Q4_K", "F32", rows[row - start : row - start + 1], one, encoder="search", importance=w
        )
        assert np.array_equal(one[0], blocks[row - start])
    measured = scale.measure(["Q4_K"], "F32", rows, start, "search")
    compared = scale.compare("F32", rows, "Q4_K", blocks, start)
    assert scale.error(measured.errors[0]) == scale.error(compared.errors[0])
