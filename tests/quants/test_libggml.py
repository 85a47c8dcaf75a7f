"""Formats of libggml: encoding and decoding, what is refused before ggml would abort, sampling."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from ramgguf.core.errors import FormatError
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml

Floats = NDArray[np.float32]
NAMES = formats.with_importance()

pytestmark = pytest.mark.skipif(not libggml.is_installed(), reason="needs llama-cpp-python")


def gaussian(n_rows: int = 4, n: int = 512) -> Floats:
    return np.random.default_rng(1).standard_normal((n_rows, n)).astype(np.float32)


def importance_of(n: int = 512) -> Floats:
    return np.exp(np.random.default_rng(2).standard_normal(n)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_decode_as_in_the_gguf_package(name: str) -> None:
    blocks = libggml.encode(name, gaussian(), importance_of())
    expected = dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(libggml.decode(name, blocks, 512), expected)


# NMSE on Gaussian weights that all count alike, within 3 %.
GAUSSIAN_NMSE = {
    "IQ1_S": 0.237,
    "IQ1_M": 0.206,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_error_on_gaussian_weights_is_the_known_one(name: str) -> None:
    x = gaussian(16, 1024)
    blocks = libggml.encode(name, x, np.ones(1024, np.float32))
    q = libggml.decode(name, blocks, 1024)
    nmse = float(((x - q) ** 2).sum() / (x**2).sum())
    assert nmse == pytest.approx(GAUSSIAN_NMSE[name], rel=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    x, w = gaussian(), importance_of()
    together = libggml.encode(name, x, w)
    alone = [libggml.encode(name, x[i : i + 1], w) for i in range(len(x))]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_ratios_of_importance_count(name: str) -> None:
    x, w = gaussian(), importance_of()
    blocks = libggml.encode(name, x, w)
    assert np.array_equal(libggml.encode(name, x, w * np.float32(2.0**60)), blocks)


@pytest.mark.parametrize(
    ("rows", "importance", "message"),
    [
        (gaussian().astype(np.float64), importance_of(), "contiguous array of rows of float32"),
        (gaussian()[:, ::2], importance_of(256), "contiguous"),
        (gaussian(2, 300), importance_of(300), "not whole blocks"),
        (gaussian(), importance_of(256), "one for each column"),
        (gaussian(), -importance_of(), "negative or not finite"),
        (gaussian(), importance_of() * np.float32(np.inf), "negative or not finite"),
        (gaussian() * np.float32(np.nan), importance_of(), "nan is NaN or too large"),
        (gaussian() * np.float32(1e5), importance_of(), "too large for IQ1_M"),
    ],
)
def test_what_ggml_would_abort_on_is_refused(
    rows: Floats, importance: Floats, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        libggml.encode("IQ1_M", rows, importance)


# Weights and importance at the edges, every format: in a process of its own, for ggml's assertions
# would end this one.
_EDGES = """
import numpy as np
from ramgguf.quants import formats
from ramgguf.quants.encoders import libggml
rng = np.random.default_rng(0)
normal = rng.standard_normal(256)
lone = np.zeros(256); lone[17] = 3
rows = [normal, 0 * normal, np.full(256, 0.3), np.full(256, -0.3), -np.abs(normal), lone,
        np.sign(normal), np.round(normal), normal * 1e-3 + 50 * (np.arange(256) % 32 == 0),
        normal * 1e-6, normal * 1e-9, normal * 1e-12, normal * 1e-20, normal * 1e-42, normal * 1e4,
        np.where(np.arange(256) < 100, 0, normal), np.linspace(-1, 1, 256), 0 * normal + 65504]
x = np.array(rows, np.float32)
some = np.exp(3 * rng.standard_normal(256))
one = np.zeros(256); one[3] = 1
kinds = [some, 0 * some, one, some * 1e-30, some * 1e30, np.where(np.arange(256) < 128, 0, some),
         np.ones(256), 10.0 ** rng.uniform(-37, 37, 256)]
for name in formats.with_importance():
    for w in kinds:
        q = libggml.decode(name, libggml.encode(name, x, w.astype(np.float32)), 256)
        assert np.isfinite(q).all(), (name, w)
        assert (np.abs(q).max(axis=1) <= 4 * np.abs(x).max(axis=1) + 1e-6).all(), name
        assert not q[1].any(), name
print("whole")
"""


def test_no_weights_or_importance_at_the_edges_abort(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _EDGES], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout == "whole\n", done.stderr[-2000:]


def test_a_missing_library_is_an_error_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libggml, "_path", lambda: None)
    libggml._library.cache_clear()
    try:
        with pytest.raises(FormatError, match=r"IQ1_S.* pip install 'ramgguf\[eval\]'"):
            libggml.require("IQ1_S")
        assert not libggml.is_installed()
        assert not libggml.decodes("NVFP4")
    finally:
        libggml._library.cache_clear()


class _Older:
    """A libggml that has other formats, or other sizes, under the numbers that are known here."""

    def __init__(self, name: bytes | None, n_bytes: int) -> None:
        self.ggml_type_name = lambda _: name
        self.ggml_type_size = lambda _: n_bytes
        self.dequantize_row_nvfp4 = None


@pytest.mark.parametrize(
    ("older", "said"),
    [
        (_Older(b"NONE", 0), "does not have NVFP4 .type 40 is 'NONE' there.; install a newer"),
        (_Older(None, 0), "does not have NVFP4"),
        (_Older(b"nvfp4", 40), "NVFP4 has 40 bytes a block, expected 36"),
    ],
)
def test_a_libggml_without_the_format_is_named_and_no_source(
    monkeypatch: pytest.MonkeyPatch, older: _Older, said: str
) -> None:
    monkeypatch.setattr(libggml, "_library", lambda: older)
    with pytest.raises(FormatError, match=said):
        libggml.decode("NVFP4", np.zeros((1, 36), np.uint8), 64)
    assert not libggml.decodes("NVFP4")


def test_a_sign_per_weight_is_encoded_with_and_without_importance() -> None:
    x = gaussian(16, 384)
    blocks = libggml.encode("Q1_0", x, None)
    assert np.array_equal(blocks, libggml.encode("Q1_0", x, importance_of(384)))
    q = libggml.decode("Q1_0", blocks, 384)
    assert np.array_equal(np.sign(q), np.sign(x))
    d = np.abs(x).reshape(16, 3, 128).mean(axis=2).astype(np.float16)
    assert np.allclose(np.abs(q).reshape(16, 3, 128), d[:, :, None], rtol=1e-3)
    nmse = float(((x - q) ** 2).sum() / (x**2).sum())
    assert nmse == pytest.approx(1 - 2 / np.pi, rel=0.03)
    with pytest.raises(ValueError, match="not whole blocks"):
        libggml.encode("Q1_0", gaussian(2, 64), None)


def test_nvfp4_decodes_to_its_formula_and_is_not_encoded() -> None:
    rng = np.random.default_rng(0)
    scales = rng.integers(0, 127, (8, 4)).astype(np.uint8)
    codes = rng.integers(0, 256, (8, 32)).astype(np.uint8)
    found = libggml.decode("NVFP4", np.concatenate([scales, codes], axis=1), 64)
    exponent, mantissa = scales.astype(int) >> 3, scales.astype(int) & 7
    d = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = codes.reshape(8, 4, 8)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    values = levels[q & 7] * np.where(q & 8, -1, 1) * d[:, :, None]
    assert np.array_equal(found, values.reshape(8, 64).astype(np.float32))
    with pytest.raises(FormatError, match="NVFP4 is decoded only"):
        libggml.encode("NVFP4", gaussian(), None)
