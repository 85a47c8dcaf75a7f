"""The bench's half-quadratic splitting writes blocks that decode to what it fitted."""

import numpy as np
import pytest
from numpy.typing import NDArray

import half_quadratic as hqq
from ramgguf import _core
from ramgguf.quants import formats


def _decoded(name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    out = np.empty((len(blocks), 256), np.float32)
    _core.decode(name, blocks, out)
    return out


@pytest.mark.parametrize("name", list(hqq.LAYOUTS))
def test_offsets_fitted_to_the_weights_lower_the_mean_error_and_leave_scales(name: str) -> None:
    x = (np.random.default_rng(0).standard_t(5, (256, 256)) * 0.05).astype(np.float32)
    x[0], x[1] = 0.0, np.float32(0.01)
    blocks = np.empty((len(x), formats.row_bytes(name, 256)), np.uint8)
    _core.encode(name, "F32", x.view(np.uint8), blocks, encoder="rtn")
    before = blocks.copy()
    fitted = hqq.fitted(name, blocks, x)
    assert np.array_equal(blocks, before)
    layout = hqq.LAYOUTS[name]
    at = layout.d_at
    assert np.array_equal(fitted[:, at : at + 2], blocks[:, at : at + 2])
    assert np.array_equal(hqq._scales(layout, fitted)[0], hqq._scales(layout, blocks)[0])
    rtn, ours = np.abs(x - _decoded(name, blocks)), np.abs(x - _decoded(name, fitted))
    assert ours.mean() < 0.99 * rtn.mean()
    assert (ours.mean(axis=1) < rtn.mean(axis=1)).mean() > 0.8
