"""Error feedback for formats whose codes stand for several weights: what holds for all of them."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from feedback_inputs import hessian_of, importance_of, weights
from ramgguf.quants.encoders import descent, gptq, iq1, libggml, points
from ramgguf.quants.encoders.decoding import decode_rows

N = 512
NAMES = sorted(points.FORMATS | iq1.FORMATS)

pytestmark = pytest.mark.skipif(not libggml.is_installed(), reason="needs llama-cpp-python")


@pytest.mark.parametrize("name", NAMES)
def test_blocks_decode_alike_in_libggml_and_in_the_gguf_package(name: str) -> None:
    hessian = hessian_of(N, 1)
    blocks = gptq.encode(name, weights(9, N, 1), hessian, importance_of(hessian))
    values = dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(decode_rows(name, blocks, N), values)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_handed_on_is_the_error_of_the_blocks(name: str) -> None:
    """x less what each column's error makes of the later ones, so that blocks and errors agree."""
    hessian, w = hessian_of(256, 2), weights(140, 256, 2)  # more rows than are rounded together
    blocks, errors = gptq._rounded(name, w.copy(), hessian.units[0], importance_of(hessian))
    u = hessian.units[0].astype(np.float64)
    expected = (w - decode_rows(name, blocks, 256)).astype(np.float64)
    np.testing.assert_allclose(errors.astype(np.float64) @ u, expected, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_error_falls_far_below_that_of_libggml(name: str) -> None:
    hessian, w = hessian_of(N, 5), weights(24, N, 5)
    importance = importance_of(hessian)
    fed_back = decode_rows(name, gptq.encode(name, w, hessian, importance), N)
    plain = decode_rows(name, libggml.encode(name, w, importance), N)
    assert 0.01 < hessian.error(w - fed_back) / hessian.error(w - plain) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_runs_repeat_and_descent_leaves_them(name: str) -> None:
    hessian, w = hessian_of(256, 7), weights(9, 256, 7)
    importance = importance_of(hessian)
    whole = gptq.encode(name, w, hessian, importance)
    assert np.array_equal(whole, gptq.encode(name, w, hessian, importance))
    assert np.array_equal(whole[4:7], gptq.encode(name, w[4:7], hessian, importance))
    assert np.array_equal(whole, descent.encode(name, w, hessian, importance))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_zeros_stay_zeros(name: str) -> None:
    hessian, w = hessian_of(256, 9), weights(3, 256, 9)
    w[1] = 0
    values = decode_rows(name, gptq.encode(name, w, hessian, importance_of(hessian)), 256)
    assert not values[1].any()
    assert values[0].any()
    assert np.isfinite(values).all()
