"""The table of block formats against ggml's own names and sizes."""

import ctypes

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggml_oracle
from ramgguf.core.errors import FormatError
from ramgguf.gguf.header import ggml_type
from ramgguf.quants import formats

NAMES = (*formats.names(), *formats.by_libggml())
IN_GGUF = [n for n in NAMES if n in gguf.GGMLQuantizationType.__members__]


@pytest.mark.parametrize("name", IN_GGUF)
def test_sizes_and_ids_are_those_of_the_gguf_package(name: str) -> None:
    f = formats.get(name)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (f.type_id, f.block_size, f.block_bytes) == (
        int(gguf.GGMLQuantizationType[name]),
        block_size,
        block_bytes,
    )
    assert f.bpw == 8 * block_bytes / block_size


@pytest.mark.parametrize("name", IN_GGUF)
def test_file_type_is_the_one_llama_cpp_means_by_the_plain_name(name: str) -> None:
    mixes = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}
    member = "ALL_F32" if name == "F32" else f"MOSTLY_{mixes.get(name, name)}"
    assert formats.file_type(name) == gguf.LlamaFileType[member]


def test_quantization_version_is_the_gguf_packages() -> None:
    assert formats.QUANTIZATION_VERSION == gguf.GGML_QUANT_VERSION


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(IN_GGUF)))
def test_formats_that_the_gguf_package_lacks_are_those_of_libggml(name: str) -> None:
    f, lib = formats.get(name), ggml_oracle.library()
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_type_size.restype, lib.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    assert lib.ggml_type_name(f.type_id).decode().upper() == name
    assert lib.ggml_type_size(f.type_id) == f.block_bytes == ggml_type(name).block_bytes
    assert lib.ggml_blck_size(f.type_id) == f.block_size
    assert (
        formats.file_type(name) == {"MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41}[name]
    )  # llama.h


def test_what_is_offered_needs_no_importance_matrix_and_is_worth_its_bits() -> None:
    assert set(formats.quantized()) - set(formats.offered()) == {"MXFP4", "Q2_0"}
    assert not set(formats.offered()) & set(formats.by_libggml())
    assert set(formats.by_libggml()) - set(formats.with_importance()) == {"NVFP4", "Q1_0"}


def test_quantized_formats_are_all_but_the_floats() -> None:
    assert set(formats.names()) - set(formats.quantized()) == {"F32", "F16", "BF16"}


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
