"""The search encoder: against ggml's own encoders as oracle, with and without importance."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import ggml_oracle
from ramgguf import _core
from ramgguf.gguf.reader import open_gguf
from ramgguf.quants import formats

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SEARCHED = [n for n in formats.quantized() if n not in ("Q8_0", *formats.TERNARY)]
# A share of ggml's squared error that no sound change of the encoder goes below. ggml's Q4_1, Q5_1,
# Q2_K, IQ3_S and IQ3_XXS are far from the least squared error: they round the range, or weigh by
# magnitude; its Q2_0 makes every block ternary.
LEAST_RATIO = dict.fromkeys(SEARCHED, 0.85) | {
    "Q2_K": 0.62,
    "Q4_1": 0.65,
    "Q5_1": 0.70,
    "IQ3_S": 0.52,
    "IQ2_XXS": 0.78,
    "IQ2_XS": 0.80,
    "IQ3_XXS": 0.55,
    "Q2_0": 0.20,
}
# The same with an importance matrix.
LEAST_WEIGHTED = (
    dict.fromkeys(SEARCHED, 0.75)
    | {"Q2_0": 0.10}
    | dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"), 0.65)
)
DISTRIBUTIONS = ("gaussian", "student_t")


@pytest.fixture(autouse=True)
def _same_level_afterwards() -> Iterator[None]:
    level = _core.isa()
    yield
    _core.set_isa(level)


def encode(
    name: str, x: Floats, *, importance: Floats | None = None, encoder: str = "search"
) -> Bytes:
    out = np.zeros((x.shape[0], formats.row_bytes(name, x.shape[1])), np.uint8)
    _core.encode(name, "F32", x.view(np.uint8), out, encoder=encoder, importance=importance)
    return out


def decode(name: str, blocks: Bytes, n: int) -> Floats:
    out = np.empty((blocks.shape[0], n), np.float32)
    _core.decode(name, blocks, out)
    return out


def error(name: str, x: Floats, blocks: Bytes, importance: Floats | None = None) -> float:
    """Return the sum of squared errors, weighted by importance if there is one."""
    squares = (x.astype(np.float64) - decode(name, blocks, x.shape[1])) ** 2
    return float((squares if importance is None else squares * importance).sum())


def weights(distribution: str, n_rows: int = 48, n: int = 1024) -> Floats:
    rng = np.random.default_rng(11)
    if distribution == "gaussian":
        return rng.standard_normal((n_rows, n)).astype(np.float32)
    return rng.standard_t(4, (n_rows, n)).astype(np.float32)


def importance_of(n: int) -> Floats:
    """Return importance as activations have it: some columns count a hundred times others."""
    return np.exp(1.5 * np.random.default_rng(12).standard_normal(n)).astype(np.float32)


def hard_rows(n: int = 768) -> Floats:
    """Return rows that go to the edges, one kind of difficulty each."""
    rng = np.random.default_rng(13)
    normal = rng.standard_normal(n)
    outliers = 1e-3 * normal
    outliers[::32] = 50
    rows = [
        normal,
        np.zeros(n),
        np.where(rng.random(n) < 0.5, -0.0, 0.0),
        np.full(n, 0.3),
        np.full(n, -0.3),
        -np.abs(normal),
        np.abs(normal) + 1,
        outliers,
        np.where(rng.random(n) < 0.1, normal, 0),
        np.sign(normal),
        1e-44 * np.sign(normal),
        1e-12 * normal,
        1e-6 * normal,
        1e4 * normal,
        np.linspace(-1, 1, n),
        np.where(np.arange(n) % 256 < 128, normal, 1e-5 * normal),
    ]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("name", SEARCHED)
def test_ggml_decodes_what_search_encodes_as_we_do(name: str) -> None:
    x = hard_rows()
    for importance in (None, importance_of(x.shape[1])):
        blocks = encode(name, x, importance=importance)
        ours = decode(name, blocks, x.shape[1])
        ggml = ggml_oracle.dequantize(name, blocks, x.shape[1])
        assert np.array_equal(ours.view(np.uint32), ggml.view(np.uint32))
        assert np.isfinite(ours).all()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", SEARCHED)
def test_the_error_is_at_most_that_of_ggmls_encoder(name: str, distribution: str) -> None:
    x = weights(distribution)
    ratio = error(name, x, encode(name, x)) / error(name, x, ggml_oracle.quantize(name, x))
    assert LEAST_RATIO[name] < ratio <= 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", SEARCHED)
def test_the_weighted_error_is_at_most_that_of_ggmls_encoder(name: str, distribution: str) -> None:
    x = weights(distribution)
    w = importance_of(x.shape[1])
    ours = error(name, x, encode(name, x, importance=w), w)
    ggml = error(name, x, ggml_oracle.quantize(name, x, w), w)
    assert LEAST_WEIGHTED[name] < ours / ggml <= 1


@pytest.mark.real
@pytest.mark.parametrize("name", SEARCHED)
def test_the_error_on_a_real_model_is_at_most_that_of_ggmls_encoder(
    name: str, smol768: Path
) -> None:
    least = min(0.6, LEAST_WEIGHTED[name], 0.9 * LEAST_RATIO[name])
    with open_gguf(smol768) as file:
        for tensor in ("blk.0.attn_q.weight", "blk.12.ffn_down.weight", "blk.29.ffn_up.weight"):
            rows = file.read_rows(file.tensor(tensor), 0, 32)
            x = rows.view(np.float16).astype(np.float32)
            w = importance_of(x.shape[1])
            for importance in (None, w):
                ours = error(name, x, encode(name, x, importance=importance), importance)
                blocks = ggml_oracle.quantize(name, x, importance)
                assert least < ours / error(name, x, blocks, importance) <= 1, tensor


@pytest.mark.parametrize("name", SEARCHED)
def test_search_is_no_worse_than_rounding(name: str) -> None:
    for distribution in DISTRIBUTIONS:
        x = weights(distribution)
        rtn = error(name, x, encode(name, x, encoder="rtn"))
        assert min(0.5, LEAST_RATIO[name]) < error(name, x, encode(name, x)) / rtn <= 1


@pytest.mark.parametrize("name", SEARCHED)
def test_every_isa_level_gives_the_same_bytes(name: str) -> None:
    x = hard_rows()
    for importance in (None, importance_of(x.shape[1])):
        found = []
        for level in _core.supported_isas():
            _core.set_isa(level)
            found.append(encode(name, x, importance=importance))
        assert all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("name", SEARCHED)
def test_measured_errors_are_those_of_the_encoded_bytes(name: str) -> None:
    x = hard_rows()
    for importance in (None, importance_of(x.shape[1])):
        measured = _core.measure(
            [name], "F32", x.view(np.uint8), encoder="search", importance=importance
        )
        blocks = encode(name, x, importance=importance)
        compared = _core.compare("F32", x.view(np.uint8), name, blocks, importance=importance)
        (a,), (b,) = measured.errors, compared.errors
        assert (a.sum_squared_error, a.max_error) == (b.sum_squared_error, b.max_error)
        assert a.weighted_squared_error == b.weighted_squared_error


@pytest.mark.parametrize("name", SEARCHED)
def test_zeros_stay_zeros(name: str) -> None:
    x = np.zeros((2, 768), np.float32)
    assert not decode(name, encode(name, x), 768).any()
    assert not decode(name, encode(name, x, importance=importance_of(768)), 768).any()


@pytest.mark.parametrize("name", SEARCHED)
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    x = hard_rows()
    importance = importance_of(x.shape[1])
    for i, row in enumerate(encode(name, x, importance=importance)):
        assert np.array_equal(encode(name, x[i : i + 1], importance=importance)[0], row)


@pytest.mark.parametrize("name", SEARCHED)
def test_columns_that_count_more_have_less_error(name: str) -> None:
    x = weights("gaussian")
    w = np.ones(x.shape[1], np.float32)
    w[::16] = 1000
    plain, weighted = (decode(name, encode(name, x, importance=i), x.shape[1]) for i in (None, w))
    before = ((x - plain)[:, ::16] ** 2).sum()
    after = ((x - weighted)[:, ::16] ** 2).sum()
    # A power of two can be moved less than a scale.
    assert 0 < after < (0.95 if name == "MXFP4" else 0.7) * before


@pytest.mark.parametrize("name", SEARCHED)
def test_only_the_ratios_of_importance_count(name: str) -> None:
    x = hard_rows()
    importance = importance_of(x.shape[1])
    blocks = encode(name, x, importance=importance)
    for factor in (2.0**-40, 2.0**40):
        scaled = (importance * factor).astype(np.float32)
        assert np.array_equal(encode(name, x, importance=scaled), blocks)


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_of_nothing_is_importance_of_all_alike(name: str) -> None:
    x = hard_rows()
    nothing, all_alike = np.zeros(x.shape[1], np.float32), np.full(x.shape[1], 3, np.float32)
    assert np.array_equal(
        encode(name, x, importance=nothing), encode(name, x, importance=all_alike)
    )


@pytest.mark.parametrize("name", SEARCHED)
def test_columns_without_importance_are_still_encoded(name: str) -> None:
    x = weights("gaussian", n_rows=4)
    w = importance_of(x.shape[1])
    w[:256] = 0
    w[300:316] = 0
    decoded = decode(name, encode(name, x, importance=w), x.shape[1])
    assert ((x - decoded)[:, :316] ** 2).sum() < 0.3 * (x[:, :316] ** 2).sum()


def test_q8_0_is_rounded_whatever_the_encoder() -> None:
    x = hard_rows()
    assert np.array_equal(encode("Q8_0", x), encode("Q8_0", x, encoder="rtn"))


@given(
    hnp.arrays(np.float32, (2, 256), elements=st.floats(-1000, 1000, width=32)),
    hnp.arrays(np.float32, (256,), elements=st.floats(0, 1000, width=32)),
)
@settings(max_examples=30, deadline=None)
def test_any_weights_and_importance_give_finite_rows_alike_on_all_levels(
    x: Floats, importance: Floats
) -> None:
    for name in SEARCHED:
        found = []
        for level in _core.supported_isas():
            _core.set_isa(level)
            found.append(encode(name, x, importance=importance))
        assert all(np.array_equal(found[0], other) for other in found[1:])
        decoded = decode(name, found[0], 256)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded).max() <= 2 * np.abs(x).max()
