"""The copy that passes run on has BF16 matrices in F16, where nothing is too large for that."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from gguf_copies import write_gguf
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.local_runner import LocalRunner
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from tiny_models import write_tiny_model

IDS = tuple(np.random.default_rng(k).integers(0, 256, 48).astype(np.int32) for k in range(2))
CHANGES = (("blk.0.attn_v.weight", "Q4_0"), ("blk.1.ffn_down.weight", "Q4_0"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "bf16.gguf", weight_type="BF16")


def _scaled(path: Path, to: str, factors: Mapping[str, float], output: Path) -> Path:
    """Write the model's matrices in a type, those named times a factor."""
    with open_gguf(path) as file:
        matrices = [t.name for t in file.tensors if t.type_name == "BF16"]

        def weights(name: str) -> np.ndarray:
            tensor = file.tensor(name)
            rows = file.read_rows(tensor, 0, tensor.n_rows)
            return decode_rows("BF16", rows, tensor.row_length)

        float32 = output.with_suffix(".f32.gguf")
        write_gguf(
            float32, file, dict.fromkeys(matrices, "F32"), {},
            lambda t, _: [in_type("F32", weights(t.name) * np.float32(factors.get(t.name, 1.0)))],
        )  # fmt: skip
    with open_gguf(float32) as file:
        write_gguf(
            output, file, dict.fromkeys(matrices, to), {},
            lambda t, _: [in_type(to, file.read_rows(t, 0, t.n_rows).view(np.float32))],
        )  # fmt: skip
    return output


def _found(path: Path, folder: Path) -> list[np.ndarray]:
    """Return the KLD of each change alone, by token."""
    with (
        open_gguf(path) as file,
        LocalRunner(file, folder, n_ctx=64, threads=1, encoder="search", imatrix=None) as runner,
    ):
        return [found.kld for _, found in runner.run([ForwardRequest((c,), IDS) for c in CHANGES])]


def _types(path: Path, folder: Path) -> tuple[GGUFFile, dict[str, str]]:
    with open_gguf(path) as file, PatchedModel(file, folder, n_ctx=64, n_threads=1) as copy:
        assert np.isfinite(copy.logits(IDS[0])).all()
        return file, {t.name: copy.stored_as(t.name) for t in file.tensors}


def test_a_source_in_bf16_gives_the_kld_of_the_same_weights_in_f16_bit_by_bit(
    model: Path, tmp_path: Path
) -> None:
    twin = _scaled(model, "F16", {}, tmp_path / "f16.gguf")
    for bf16, f16 in zip(_found(model, tmp_path), _found(twin, tmp_path), strict=True):
        assert f16.any()
        assert np.array_equal(bf16, f16)


def test_a_matrix_with_a_weight_too_large_for_f16_stays_bf16(model: Path, tmp_path: Path) -> None:
    factors = {"blk.1.ffn_gate.weight": 1e6, "blk.1.ffn_up.weight": 1e-6}
    large = _scaled(model, "BF16", factors, tmp_path / "large.gguf")
    _, types = _types(large, tmp_path)
    assert types.pop("blk.1.ffn_gate.weight") == "BF16"
    assert {t for name, t in types.items() if "norm" not in name} == {"F16"}
    assert {t for name, t in types.items() if "norm" in name} == {"F32"}


def test_matrices_stay_bf16_where_inputs_would_be_too_large_for_f16(
    model: Path, tmp_path: Path
) -> None:
    factors = {"blk.0.ffn_up.weight": 2e5, "blk.0.ffn_down.weight": 2.0**-17}
    large = _scaled(model, "BF16", factors, tmp_path / "large.gguf")
    file, types = _types(large, tmp_path)
    assert types == {t.name: t.type_name for t in file.tensors}
