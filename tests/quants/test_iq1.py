"""Error feedback in IQ1_S and IQ1_M: blocks, choices and errors against their definitions."""

import numpy as np
import pytest
from numpy.typing import NDArray

from feedback_inputs import hessian_of, importance_of, weights
from ramgguf.quants.encoders import iq1, libggml
from ramgguf.quants.encoders.decoding import decode_rows

Floats = NDArray[np.float32]

NAMES = sorted(iq1.FORMATS)

pytestmark = pytest.mark.skipif(not libggml.is_installed(), reason="needs llama-cpp-python")


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_libggmls_and_offsets_of_32_weights_too(name: str) -> None:
    hessian, w = hessian_of(256, 3), weights(5, 256, 3)
    plain = libggml.encode(name, w, importance_of(hessian))
    blocks, _ = iq1.round_unit(name, w.copy(), hessian.units[0], importance_of(hessian))
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
    hessian, w = hessian_of(256, 6), weights(20, 256, 6)
    u = hessian.units[0]
    blocks, errors = iq1.round_unit(name, w.copy(), u, importance_of(hessian))
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
