"""Error feedback in IQ1_S and IQ1_M: blocks, choices and errors against their definitions."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from feedback_inputs import correlated, weights
from ramgguf.quants.encoders import descent, gptq, iq1, libggml
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian

Floats = NDArray[np.float32]

N = 512
NAMES = sorted(iq1.FORMATS)

pytestmark = pytest.mark.skipif(not libggml.is_installed(), reason="needs llama-cpp-python")


def _hessian(n: int, seed: int) -> Hessian:
    x = correlated(n, 4 * n, seed)
    return Hessian.of(x.T @ x, len(x))


def _importance(hessian: Hessian) -> Floats:
    return np.ascontiguousarray(np.diag(hessian.mean))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_decode_alike_in_libggml_and_in_the_gguf_package(name: str) -> None:
    hessian = _hessian(N, 1)
    blocks = gptq.encode(name, weights(9, N, 1), hessian, _importance(hessian))
    values = dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(decode_rows(name, blocks, N), values, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_on_is_the_error_of_the_blocks(name: str) -> None:
    hessian, w = _hessian(256, 2), weights(140, 256, 2)  # more rows than are rounded together
    blocks, errors = iq1.round_unit(name, w.copy(), hessian.units[0], _importance(hessian))
    u = hessian.units[0].astype(np.float64)
    expected = (w - decode_rows(name, blocks, 256)).astype(np.float64)
    np.testing.assert_allclose(errors.astype(np.float64) @ u, expected, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_error_falls_far_below_that_of_libggml(name: str) -> None:
    hessian, w = _hessian(N, 5), weights(24, N, 5)
    importance = _importance(hessian)
    fed_back = decode_rows(name, gptq.encode(name, w, hessian, importance), N)
    plain = decode_rows(name, libggml.encode(name, w, importance), N)
    assert 0.01 < hessian.error(w - fed_back) / hessian.error(w - plain) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_libggmls_and_offsets_of_32_weights_too(name: str) -> None:
    hessian, w = _hessian(256, 3), weights(5, 256, 3)
    plain = libggml.encode(name, w, _importance(hessian))
    blocks, _ = iq1.round_unit(name, w.copy(), hessian.units[0], _importance(hessian))
    scales, signs = iq1._scales(name, plain)
    found, found_signs = iq1._scales(name, blocks)
    assert np.array_equal(found, scales)
    assert (name == "IQ1_S") == np.array_equal(found_signs, signs)
    # As the decoder has them: each group is a scale times elements -1, 0, 1 and an offset.
    q = decode_rows(name, blocks, 256).reshape(5, 32, 8)
    elements = q / scales[..., None] - 0.125 * found_signs[..., None]
    np.testing.assert_allclose(elements, np.rint(elements), atol=1e-4)
    assert set(np.rint(elements).ravel()) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_group_takes_the_best_of_all_points_and_offsets(name: str) -> None:
    hessian, w = _hessian(256, 6), weights(20, 256, 6)
    u = hessian.units[0]
    blocks, errors = iq1.round_unit(name, w.copy(), u, _importance(hessian))
    scales, signs = iq1._scales(name, blocks)
    inverse = np.linalg.inv(u[:8, :8].astype(np.float64))
    book = iq1._book(name).astype(np.float64)
    assert len({tuple(c) for c in book}) == 2048
    for row, scale, sign, error in zip(w, scales[:, 0], signs[:, 0], errors[:, :8], strict=True):
        offsets = (sign,) if name == "IQ1_S" else (-1, 1)
        least = min(
            np.square((row[:8] - scale * (book + 0.125 * o)) @ inverse).sum(axis=1).min()
            for o in offsets
        )
        assert np.square(error.astype(np.float64)).sum() == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_runs_repeat_and_descent_leaves_them(name: str) -> None:
    hessian, w = _hessian(256, 7), weights(9, 256, 7)
    importance = _importance(hessian)
    whole = gptq.encode(name, w, hessian, importance)
    assert np.array_equal(whole, gptq.encode(name, w, hessian, importance))
    assert np.array_equal(whole[4:7], gptq.encode(name, w[4:7], hessian, importance))
    assert np.array_equal(whole, descent.encode(name, w, hessian, importance))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    hessian, w = _hessian(256, 9), weights(3, 256, 9)
    w[1] = 0
    values = decode_rows(name, gptq.encode(name, w, hessian, _importance(hessian)), 256)
    assert not values[1].any()
    assert values[0].any()
    assert np.isfinite(values).all()
