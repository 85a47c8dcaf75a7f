"""Encoding, decoding and measuring block formats: against ggml, across ISA levels, at the edges."""

import ctypes
import platform
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import ggml_oracle
from ramgguf import _core
from ramgguf.quants import formats

FORMATS = formats.names()
QUANTIZED = formats.quantized()
TERNARY_LIKE = ("TQ1_0", "TQ2_0", "Q2_0")
RTN_IN_GGML = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ROW = 768

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _same_level_afterwards() -> Iterator[None]:
    level = _core.isa()
    yield
    _core.set_isa(level)


def encode(name: str, x: Floats, *, importance: Floats | None = None) -> Bytes:
    out = np.zeros((x.shape[0], formats.row_bytes(name, x.shape[1])), np.uint8)
    _core.encode(name, "F32", x.view(np.uint8), out, importance=importance)
    return out


def decode(name: str, q: Bytes, n: int = ROW) -> Floats:
    out = np.empty((q.shape[0], n), np.float32)
    _core.decode(name, q, out)
    return out


def nmse(x: Floats, q: Floats) -> float:
    x64 = x.astype(np.float64)
    return float(((x64 - q) ** 2).sum() / (x64**2).sum())


def corpus() -> Floats:
    """Return rows that go to the edges: each row is one kind of difficulty."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(ROW).astype(np.float32)
    outlier = normal * np.float32(1e-3)
    outlier[::32] = 50
    ramp = np.linspace(-1, 1, ROW, dtype=np.float32)
    signed_zeros = np.where(rng.random(ROW) < 0.5, np.float32(-0.0), np.float32(0.0))
    rows = [
        normal,
        np.zeros(ROW),
        signed_zeros,
        np.where(rng.random(ROW) < 0.7, signed_zeros, np.abs(normal)),
        np.full(ROW, 0.3),
        np.full(ROW, -0.3),
        np.abs(normal),
        -np.abs(normal),
        -1000 - normal * 1e-3,
        outlier,
        ramp,
        np.repeat(normal[::32], 32),
        np.round(normal, 1),
        np.round(normal * 2) / 2,  # ties of magnitude, and codes half-way
        np.where(np.arange(ROW) % 2 == 0, 0.5, -0.5),
        normal.astype(np.float16),
        rng.standard_t(3, ROW),
        rng.standard_cauchy(ROW).clip(-1e4, 1e4),
        normal * 1e-7,  # scales are F16 denormals
        normal * 1e-12,  # scales are zero
        normal * 1e-38,
        normal * 1e-42,  # denormals
        normal * 1.5e4,  # every scale still fits
        np.where(np.arange(ROW) < 300, 0, normal),
    ]
    return np.stack([np.asarray(r, dtype=np.float32) for r in rows])


# --- against ggml ---


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", RTN_IN_GGML)
def test_bytes_are_those_of_ggmls_reference(name: str, isa: str) -> None:
    _core.set_isa(isa)
    rng = np.random.default_rng(3)
    for x in (corpus(), *(rng.standard_t(4, (64, ROW)).astype(t).astype("f4") for t in "fe")):
        ours = encode(name, x)
        assert np.array_equal(ours, ggml_oracle.quantize_reference(name, x))
        assert np.array_equal(ours, ggml_oracle.quantize(name, x))


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", TERNARY_LIKE)
def test_ternary_bytes_are_those_of_ggmls_reference(name: str, isa: str) -> None:
    _core.set_isa(isa)
    rng = np.random.default_rng(3)
    ternary = rng.integers(-1, 2, (8, ROW)) * rng.uniform(0.1, 2, (8, 1)).astype("f4")
    for x in (rng.standard_t(4, (64, ROW)), rng.standard_normal((64, ROW)).round(1), ternary):
        rows = x.astype(np.float32)
        assert np.array_equal(encode(name, rows), ggml_oracle.quantize_reference(name, rows))


@pytest.mark.parametrize("name", TERNARY_LIKE)
@pytest.mark.parametrize("encoder", ["rtn", "search"])
def test_ternary_weights_are_held_exactly(name: str, encoder: str) -> None:
    rng = np.random.default_rng(4)
    d = rng.uniform(0.01, 2, (ROW // 256, 1)).astype(np.float16).astype(np.float32)
    x = np.ascontiguousarray((rng.integers(-1, 2, (ROW // 256, 256)) * d).reshape(1, ROW), "f4")
    assert _core.measure([name], "F32", x.view("u1"), encoder=encoder).errors[0].max_error == 0


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", ["MXFP4", "IQ3_S"])
def test_the_error_is_at_most_that_of_ggmls_encoder(name: str, isa: str) -> None:
    _core.set_isa(isa)
    rng = np.random.default_rng(5)
    for x in (rng.standard_normal((64, ROW)), rng.standard_t(4, (64, ROW))):
        rows = x.astype(np.float32)
        ggml = ggml_oracle.dequantize(name, ggml_oracle.quantize(name, rows), ROW)
        assert 0.6 < nmse(rows, decode(name, encode(name, rows))) / nmse(rows, ggml) <= 1


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", FORMATS[1:])
def test_ggml_decodes_our_bytes_to_our_bits(name: str, isa: str) -> None:
    _core.set_isa(isa)
    q = encode(name, corpus())
    ours = decode(name, q)
    assert np.array_equal(ours.view(np.uint32), ggml_oracle.dequantize(name, q, ROW).view("u4"))


@pytest.mark.parametrize("isa", _core.supported_isas())
@pytest.mark.parametrize("name", QUANTIZED)
def test_any_bytes_decode_as_in_ggml(name: str, isa: str) -> None:
    _core.set_isa(isa)
    rng = np.random.default_rng(11)
    q = rng.integers(0, 256, (50, formats.row_bytes(name, ROW)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours, theirs = decode(name, q), ggml_oracle.dequantize(name, q, ROW)
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))
    finite = ~np.isnan(ours)
    assert np.array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_all_halves_decode_as_in_numpy(isa: str) -> None:
    _core.set_isa(isa)
    halves = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    found = decode("F16", halves.view(np.uint8), 1024)
    with np.errstate(invalid="ignore"):  # raised by signalling NaNs, where the CPU converts them
        expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(found[~np.isnan(found)], expected[~np.isnan(found)])


@pytest.mark.parametrize("isa", _core.supported_isas())
def test_floats_round_to_halves_as_in_numpy(isa: str) -> None:
    _core.set_isa(isa)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    near = np.concatenate([f(between, np.float32(1e30)) for f in (np.fmin, np.nextafter)])
    x = np.concatenate([halves, near, np.nextafter(between, np.float32(-1))]).reshape(1, -1)
    x = np.concatenate([x, -x])
    out = np.empty((2, 2 * x.shape[1]), np.uint8)
    _core.encode("F16", "F32", x.view(np.uint8), out)
    assert np.array_equal(out.view(np.uint16), x.astype(np.float16).view(np.uint16))


# --- the same bytes everywhere ---


@pytest.mark.parametrize("name", FORMATS)
def test_every_isa_level_gives_the_same_bytes_and_errors(name: str) -> None:
    x = corpus() if name != "BF16" else corpus()[:-3]
    rng = np.random.default_rng(5)
    importance = rng.gamma(1, 1, ROW).astype(np.float32)
    found = set()
    for isa in _core.supported_isas():
        _core.set_isa(isa)
        assert _core.isa() == isa
        stats = _core.measure([name], "F32", x.view(np.uint8), importance=importance)
        error = stats.errors[0]
        numbers = (stats.sum, stats.sum_squares, stats.sum_cubes, stats.sum_fourths)
        more = (stats.weighted_sum_squares, stats.max_abs, error.sum_squared_error)
        last = (error.weighted_squared_error, error.max_error, error.scale_overflow)
        found.add((encode(name, x).tobytes(), *numbers, *more, *last))
    assert len(found) == 1


@pytest.mark.parametrize("name", FORMATS)
@given(rows=st.lists(st.integers(0, 23), min_size=1, max_size=4), cut=st.integers(1, 24))
@settings(max_examples=10, deadline=None)
def test_rows_are_independent(name: str, rows: list[int], cut: int) -> None:
    f = formats.get(name)
    n = 32 * cut // f.block_size * f.block_size or f.block_size
    x = np.ascontiguousarray(corpus()[rows, :n])
    together = encode(name, x)
    alone = [encode(name, x[i : i + 1]) for i in range(len(rows))]
    assert np.array_equal(together, np.concatenate(alone))


# --- properties ---


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows_stay_zero(name: str) -> None:
    zeros = np.zeros((3, ROW), np.float32)
    assert not np.any(decode(name, encode(name, zeros)))
    assert _core.measure([name], "F32", zeros.view("u1")).errors[0].sum_squared_error == 0


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 7, 8, 9, 63, 64, 65])
def test_every_short_length_is_encoded_whole(name: str, n_blocks: int) -> None:
    f = formats.get(name)
    n = n_blocks * f.block_size
    x = np.random.default_rng(n).standard_normal((2, n)).astype(np.float32)
    whole = np.zeros((2, formats.row_bytes(name, n)), np.uint8)
    _core.encode(name, "F32", x.view(np.uint8), whole)
    for start in range(0, n, f.block_size):
        block = np.ascontiguousarray(x[:, start : start + f.block_size])
        at = start // f.block_size * f.block_bytes
        assert np.array_equal(whole[:, at : at + f.block_bytes], encode(name, block))


# NMSE on Gaussian weights: a little above and below what RTN gives, so that a result that is
# suddenly better fails too.
GAUSSIAN_NMSE = {
    "Q4_0": 7.425e-03,
    "Q4_1": 6.132e-03,
    "Q5_0": 1.830e-03,
    "Q5_1": 1.434e-03,
    "Q8_0": 2.881e-05,
    "Q2_K": 1.081e-01,
    "Q3_K": 2.409e-02,
    "Q4_K": 6.163e-03,
    "Q5_K": 1.460e-03,
    "Q6_K": 3.551e-04,
    "IQ4_NL": 6.396e-03,
    "IQ4_XS": 6.423e-03,
    "IQ3_S": 1.954e-02,
    "IQ3_XXS": 3.494e-02,
    "IQ2_S": 6.830e-02,
    "IQ2_XS": 9.608e-02,
    "IQ2_XXS": 1.1814e-01,
    "MXFP4": 1.336e-02,
    "TQ1_0": 6.55e-01,
    "TQ2_0": 6.55e-01,
    "Q2_0": 5.18e-01,
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_error_on_gaussian_weights_is_the_known_one(name: str) -> None:
    x = np.random.default_rng(1).standard_normal((512, 1024)).astype(np.float32)
    stats = _core.measure([name], "F32", x.view(np.uint8))
    found = stats.errors[0].sum_squared_error / stats.sum_squares
    assert found == pytest.approx(GAUSSIAN_NMSE[name], rel=0.01)


@pytest.mark.parametrize(
    "family", [("Q2_K", "Q4_K", "Q5_K"), ("Q3_K", "Q6_K"), ("Q4_0", "Q5_0", "Q8_0")]
)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_more_bits_never_raise_the_error_on_gaussian_weights(
    family: tuple[str, ...], seed: int
) -> None:
    x = np.random.default_rng(seed).standard_normal((4, ROW)).astype(np.float32)
    errors = _core.measure(list(family), "F32", x.view(np.uint8)).errors
    found = [e.sum_squared_error for e in errors]
    assert found == sorted(found, reverse=True)


# --- measuring ---


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_measured_error_is_bit_for_bit_the_error_of_the_bytes(name: str, weighted: bool) -> None:
    x = np.random.default_rng(2).standard_t(3, (37, ROW)).astype(np.float32)
    x[3] *= np.float32(1e-25)  # far outside the range of float's squares
    w = np.random.default_rng(4).gamma(1, 1, ROW).astype(np.float32) if weighted else None
    measured = _core.measure([name], "F32", x.view(np.uint8), importance=w)
    q = encode(name, x)
    compared = _core.compare("F32", x.view(np.uint8), name, q, importance=w)
    for a, b in ((measured.errors[0], compared.errors[0]),):
        assert a.sum_squared_error == b.sum_squared_error
        assert a.weighted_squared_error == b.weighted_squared_error
        assert a.max_error == b.max_error
    assert measured.sum_fourths == compared.sum_fourths
    error = x.astype(np.float64) - decode(name, q)
    assert measured.errors[0].sum_squared_error == pytest.approx((error**2).sum(), rel=1e-6)
    assert measured.errors[0].max_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    if w is not None:
        expected = (w * error**2).sum()
        assert measured.errors[0].weighted_squared_error == pytest.approx(expected, rel=1e-6)


def test_power_sums_are_numpys() -> None:
    x = corpus()
    w = np.random.default_rng(4).gamma(1, 1, ROW).astype(np.float32)
    stats = _core.measure([], "F32", x.view(np.uint8), importance=w)
    x64 = x.astype(np.float64)
    assert stats.n_weights == x.size
    assert stats.max_abs == np.abs(x).max()
    assert stats.sum == pytest.approx(x64.sum(), rel=1e-6)
    assert stats.sum_squares == pytest.approx((x64**2).sum(), rel=1e-6)
    assert stats.sum_cubes == pytest.approx((x64**3).sum(), rel=1e-5)
    assert stats.sum_fourths == pytest.approx((x64**4).sum(), rel=1e-6)
    assert stats.weighted_sum_squares == pytest.approx((w * x64**2).sum(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e35])
def test_sums_hold_far_outside_floats_own_squares(scale: float) -> None:
    x = (np.random.default_rng(6).standard_normal((2, ROW)) * scale).astype(np.float32)
    stats = _core.measure(["BF16"], "F32", x.view(np.uint8))
    x64 = x.astype(np.float64)
    assert stats.sum_squares == pytest.approx((x64**2).sum(), rel=1e-12)
    assert stats.sum_fourths == pytest.approx((x64**4).sum(), rel=1e-12)
    error = x64 - decode("BF16", encode("BF16", x))
    assert stats.errors[0].sum_squared_error == pytest.approx((error**2).sum(), rel=1e-12)


@pytest.mark.parametrize("source", ["F16", "BF16", "Q8_0"])
def test_other_sources_measure_as_their_floats_do(source: str) -> None:
    q = encode(source, np.random.default_rng(8).standard_normal((5, ROW)).astype(np.float32))
    x = decode(source, q)
    from_source = _core.measure(list(QUANTIZED), source, q)
    from_floats = _core.measure(list(QUANTIZED), "F32", x.view(np.uint8))
    assert from_source.sum_squares == from_floats.sum_squares
    for a, b in zip(from_source.errors, from_floats.errors, strict=True):
        assert a.sum_squared_error == b.sum_squared_error
        out = np.empty((5, formats.row_bytes(a.format, ROW)), np.uint8)
        _core.encode(a.format, source, q, out)
        assert np.array_equal(out, encode(a.format, x))


def test_merged_parts_add_up_in_order() -> None:
    x = np.random.default_rng(9).standard_normal((6, ROW)).astype(np.float32)
    parts = [_core.measure(["Q4_K"], "F32", x[i : i + 2].view(np.uint8)) for i in (0, 2, 4)]
    all_of_it = _core.RowStats.merged(parts)
    assert all_of_it.n_weights == x.size
    expected = parts[0].sum_squares + parts[1].sum_squares + parts[2].sum_squares
    assert all_of_it.sum_squares == expected
    error = sum(
        (p.errors[0].sum_squared_error for p in parts[1:]), parts[0].errors[0].sum_squared_error
    )
    assert all_of_it.errors[0].sum_squared_error == error
    assert all_of_it.errors[0].max_error == max(p.errors[0].max_error for p in parts)


def test_merged_parts_know_where_the_first_bad_weight_is() -> None:
    x = np.ones((4, 64), np.float32)
    x[3, 5] = np.inf
    parts = [_core.measure([], "F32", x[i : i + 1].view(np.uint8)) for i in range(4)]
    assert _core.RowStats.merged(parts).first_nonfinite == 3 * 64 + 5


# --- what is refused ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
def test_a_weight_that_is_not_finite_is_named(source: str, bad: float) -> None:
    x = np.zeros((9, ROW), np.float32)
    x[7, 301] = bad
    raw = {
        "F32": x.view(np.uint8),
        "F16": x.astype(np.float16).view(np.uint8),
        "BF16": np.ascontiguousarray(x.view(np.uint16)[:, 1::2]).view(np.uint8),
    }[source]
    assert _core.measure(["Q4_K"], source, raw).first_nonfinite == 7 * ROW + 301
    out = np.empty((9, formats.row_bytes("Q4_K", ROW)), np.uint8)
    with pytest.raises(ValueError, match=r"NaN or infinity, first in row 7, column 301"):
        _core.encode("Q4_K", source, raw, out)


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("F32", "BF16", "MXFP4")])
def test_weights_too_large_for_the_scales_are_flagged_and_refused(name: str) -> None:
    x = np.zeros((5, ROW), np.float32)
    x[3, 99] = 3e38
    error = _core.measure([name], "F32", x.view(np.uint8)).errors[0]
    assert error.scale_overflow
    assert error.sum_squared_error == np.inf
    out = np.zeros((5, formats.row_bytes(name, ROW)), np.uint8)
    for encoder in ("rtn", "search"):
        with pytest.raises(ValueError, match=f"row 3, column 99 is too large for {name}"):
            _core.encode(name, "F32", x.view(np.uint8), out, encoder=encoder)


@pytest.mark.parametrize("name", QUANTIZED)
def test_large_weights_whose_scales_fit_are_no_overflow(name: str) -> None:
    x = np.full((1, ROW), 6e4, np.float32)
    x[0, ::2] *= -1
    assert not _core.measure([name], "F32", x.view(np.uint8)).errors[0].scale_overflow
    # Most points of IQ2_XXS have levels of two sizes, whatever the weights.
    assert nmse(x, decode(name, encode(name, x))) < (0.25 if name == "IQ2_XXS" else 0.2)


def test_arrays_that_do_not_suit_are_refused_by_name() -> None:
    x = np.zeros((4, ROW), np.float32)
    raw, out = x.view(np.uint8), np.zeros((4, 432), np.uint8)
    with pytest.raises(ValueError, match=r"format 'Q4_9' is unknown; known are F32, F16"):
        _core.encode("Q4_9", "F32", raw, out)
    with pytest.raises(ValueError, match=r"encoder 'best' is unknown"):
        _core.encode("Q4_K", "F32", raw, out, encoder="best")
    with pytest.raises(ValueError, match=r"src has dtype float32, expected uint8"):
        _core.encode("Q4_K", "F32", x, out)  # type: ignore[arg-type]  # that is the test
    with pytest.raises(ValueError, match=r"src has 1 dimensions, expected 2"):
        _core.encode("Q4_K", "F32", raw[0], out)
    with pytest.raises(ValueError, match=r"src is not C-contiguous"):
        _core.encode("Q4_K", "F32", raw[:, ::2], out)
    with pytest.raises(ValueError, match=r"out holds 3 rows of 768 weights, src 4 rows of 768"):
        _core.encode("Q4_K", "F32", raw, out[:3])
    with pytest.raises(ValueError, match=r"out has rows of 431 bytes, expected a multiple of the"):
        _core.encode("Q4_K", "F32", raw, np.zeros((4, 431), np.uint8))
    with pytest.raises(ValueError, match=r"rows of 288 weights are not whole blocks of 256"):
        _core.measure(["Q4_K"], "F32", np.zeros((4, 288 * 4), np.uint8))
    with pytest.raises(ValueError, match=r"importance has 5 entries, expected one for each of 768"):
        _core.measure(["Q4_K"], "F32", raw, importance=np.ones(5, np.float32))
    with pytest.raises(ValueError, match=r"importance\[3\] is negative or not finite"):
        _core.measure(
            ["Q4_K"], "F32", raw, importance=np.where(np.arange(ROW) == 3, -1, 1).astype("f4")
        )
    out.setflags(write=False)
    with pytest.raises(ValueError, match=r"out is read-only"):
        _core.encode("Q4_K", "F32", raw, out)


# --- the caller's floating-point mode ---

# In glibc's fenv_t: where the mode is, rounding up with denormals as zeros, and the bits of modes.
_MODES = {
    "x86_64": (28, 0x4000 | 0x8000 | 0x0040, 0xFFC0),  # MXCSR
    "aarch64": (0, 0x0040_0000 | 0x0100_0000, 0x01C0_0000),  # FPCR
}


@pytest.mark.skipif(platform.machine() not in _MODES, reason="reads fenv_t as glibc lays it out")
@pytest.mark.parametrize("isa", _core.supported_isas())
def test_the_callers_rounding_and_flush_modes_neither_matter_nor_change(isa: str) -> None:
    _core.set_isa(isa)
    libm = ctypes.CDLL("libm.so.6")
    usual, changed, after = (ctypes.create_string_buffer(32) for _ in range(3))
    x = corpus()
    expected = [(encode(n, x).tobytes(), _measured(n, x)) for n in QUANTIZED]
    offset, odd, modes = _MODES[platform.machine()]
    word = slice(offset, offset + 4)
    libm.fegetenv(usual)
    mode = int.from_bytes(usual.raw[word], "little") | odd
    changed.raw = usual.raw[:offset] + mode.to_bytes(4, "little") + usual.raw[word.stop :]
    libm.fesetenv(changed)
    try:
        found = [(encode(n, x).tobytes(), _measured(n, x)) for n in QUANTIZED]
        libm.fegetenv(after)
    finally:
        libm.fesetenv(usual)
    assert found == expected
    assert int.from_bytes(after.raw[word], "little") & modes == mode & modes


def _measured(name: str, x: Floats) -> tuple[float, float, float]:
    stats = _core.measure([name], "F32", x.view(np.uint8))
    return stats.sum_squares, stats.sum_fourths, stats.errors[0].sum_squared_error
