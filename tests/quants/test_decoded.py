"""A quantized file in the types of its source: the same weights, read by the source's kernels."""

import re
from pathlib import Path

import numpy as np
import pytest

import ramgguf
from ramgguf.core.errors import FormatError
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants.decoded import write_decoded
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from tiny_models import write_tiny_model


def test_every_tensor_has_the_type_of_its_source_and_the_values_of_the_file(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")
    made = ramgguf.quantize(model, "45%", tmp_path / "small.gguf", effort="fast")
    with open_gguf(made.paths[0]) as file, open_gguf(model) as source:
        path = write_decoded(file, source, tmp_path / "decoded.gguf", threads=2)
        assert [t.type_name for t in file.tensors] != [t.type_name for t in source.tensors]
        with open_gguf(path) as decoded:
            assert {t.name: t.type_name for t in decoded.tensors} == {
                t.name: t.type_name for t in source.tensors
            }
            for tensor in file.tensors:
                rows = file.read_rows(tensor, 0, tensor.n_rows)
                expected = decode_rows(tensor.type_name, rows, tensor.row_length)
                other = decoded.tensor(tensor.name)
                found = decode_rows(
                    other.type_name, decoded.read_rows(other, 0, other.n_rows), other.row_length
                )
                if other.type_name == "F16":
                    expected = expected.astype(np.float16).astype(np.float32)
                assert np.array_equal(found, expected)
            assert decoded.metadata.integer("general.file_type") == source.metadata.integer(
                "general.file_type"
            )


def test_a_tensor_that_was_quantized_in_the_source_stays_as_it_is(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny-q8.gguf", weight_type="Q8_0")
    with open_gguf(model) as file:
        path = write_decoded(file, file, tmp_path / "decoded.gguf", threads=1)
        with open_gguf(path) as decoded:
            for tensor in file.tensors:
                assert decoded.tensor(tensor.name).type_name == tensor.type_name
                assert np.array_equal(
                    decoded.read_rows(decoded.tensor(tensor.name), 0, tensor.n_rows),
                    file.read_rows(tensor, 0, tensor.n_rows),
                )


@pytest.mark.parametrize(
    ("name", "limit"), [("F16", 65520.0), ("BF16", float.fromhex("0x1.ffp127")), ("F32", np.inf)]
)
def test_weights_up_to_what_rounds_to_infinity_fit_a_type_and_others_are_refused(
    name: str, limit: float
) -> None:
    first, most = np.float32(limit), np.nextafter(np.float32(limit), np.float32(0))
    for sign in (1, -1):
        rows = in_type(name, np.full((2, 32), sign * most, np.float32))
        assert np.isfinite(decode_rows(name, rows, 32)).all()
        for bad in (sign * first, np.float32(np.nan)):
            weights = np.ones((2, 32), np.float32)
            weights[1, 7] = bad
            said = re.escape(f"a weight of {abs(bad):g} is NaN or too large for {name}")
            with pytest.raises(FormatError, match=said):
                in_type(name, weights)
    assert in_type(name, np.empty((0, 32), np.float32)).size == 0
