"""The table of block formats against ggml's own names and sizes."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramgguf import formats
from ramgguf.errors import FormatError

NAMES = formats.names()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_ids_are_those_of_the_gguf_package(name: str) -> None:
    f = formats.get(name)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (f.type_id, f.block_size, f.block_bytes) == (
        int(gguf.GGMLQuantizationType[name]),
        block_size,
        block_bytes,
    )
    assert f.bpw == 8 * block_bytes / block_size


@pytest.mark.parametrize("name", NAMES)
def test_file_type_is_the_one_llama_cpp_means_by_the_plain_name(name: str) -> None:
    mixes = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
    member = "ALL_F32" if name == "F32" else f"MOSTLY_{mixes.get(name, name)}"
    assert formats.file_type(name) == gguf.LlamaFileType[member]


def test_quantization_version_is_the_gguf_packages() -> None:
    assert formats.QUANTIZATION_VERSION == gguf.GGML_QUANT_VERSION


def test_quantized_formats_are_all_but_the_floats() -> None:
    assert set(NAMES) - set(formats.quantized()) == {"F32", "F16", "BF16"}


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"'Q9_K' is unknown; known are .*Q4_K"):
        formats.get("Q9_K")


@given(st.sampled_from(NAMES), st.integers(1, 2048))
def test_a_format_suits_exactly_the_rows_whose_bytes_it_can_tell(name: str, n: int) -> None:
    if formats.suits(name, n):
        assert formats.row_bytes(name, n) * 8 == pytest.approx(formats.get(name).bpw * n)
    else:
        with pytest.raises(FormatError, match=f"{name} has blocks of"):
            formats.row_bytes(name, n)
