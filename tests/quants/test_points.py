"""Error feedback for formats of points: blocks, choices and errors against their definitions."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from feedback_inputs import hessian_of, importance_of, weights
from ramgguf import _core
from ramgguf.quants.encoders import gptq, libggml, points
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian

Floats = NDArray[np.float32]

N = 512
NAMES = sorted(points.FORMATS)

pytestmark = pytest.mark.skipif(not libggml.is_installed(), reason="needs llama-cpp-python")


@pytest.mark.parametrize("name", NAMES)
def test_without_correlation_the_points_are_no_worse_than_those_of_search(name: str) -> None:
    w = weights(16, N, 3)
    importance = np.random.default_rng(4).uniform(0.5, 2, N).astype(np.float32)
    hessian = Hessian.of(np.diag(importance), 1, damping=0)
    found = decode_rows(name, gptq._swept(name, w, hessian, importance)[0], N)
    searched = decode_rows(name, points.searched(name, w, importance), N)
    ratio = hessian.error(w - found) / hessian.error(w - searched)
    # `search` finds the best signs of points with even signs, error feedback good ones.
    assert 0.9 < ratio <= (1.004 if points._LAYOUTS[name].even_signs else 1.0001)


@pytest.mark.parametrize(
    ("group", "even", "most"), [(4, False, 1.1), (4, True, 1.3), (8, False, 1.1), (8, True, 1.2)]
)
def test_the_first_weights_take_nearly_the_best_of_all_points_and_signs(
    group: int, even: bool, most: float
) -> None:
    """Against all of them; of points of four with even signs, those of eight weights together."""
    rng = np.random.default_rng(6)
    n_rows, n_points = 30, 16
    book = rng.uniform(0.2, 3, (group, n_points)).astype(np.float32)
    u = hessian_of(256, 6).units[0]
    w = rng.standard_normal((n_rows, 256)).astype(np.float32)
    numbers, signs = np.empty((n_rows, 256 // group), np.uint16), np.empty((n_rows, 32), np.uint8)
    errors, ones = np.empty((n_rows, 256), np.float32), np.ones((n_rows, 8), np.float32)
    _core.round_points(w.copy(), u, ones, book, even, numbers, signs, errors)
    assert numbers.max() < n_points
    n_negative = np.unpackbits(signs[..., None], axis=-1).sum(axis=-1)
    assert not even or not (n_negative % 2).any()

    flips = np.array(list(itertools.product((-1, 1), repeat=group)))
    q = (flips[:, None, :] * book.T.astype(np.float64)).reshape(-1, group)
    if even and group == 4:
        q = np.array([np.concatenate(halves) for halves in itertools.product(q, q)])
    if even:
        q = q[(q < 0).sum(axis=1) % 2 == 0]
    n = q.shape[1]
    inverse = np.linalg.inv(u[:n, :n].astype(np.float64))
    least = [np.square((row[:n] - q) @ inverse).sum(axis=1).min() for row in w]
    found = np.square(errors[:, :n].astype(np.float64)).sum(axis=1)
    assert (found >= np.array(least) * (1 - 1e-4)).all()
    assert found.sum() < most * sum(least)


@pytest.mark.parametrize("name", NAMES)
def test_all_levels_choose_the_same_points(name: str) -> None:
    hessian, w = hessian_of(256, 8), weights(5, 256, 8)
    before = _core.isa()
    found = []
    try:
        for level in _core.supported_isas():
            _core.set_isa(level)
            found.append(gptq.encode(name, w, hessian, importance_of(hessian)))
    finally:
        _core.set_isa(before)
    assert all(np.array_equal(blocks, found[0]) for blocks in found)


def test_what_does_not_fit_is_refused() -> None:
    def call(
        *, n: int = 256, group: int = 4, n_points: int = 16, n_scales: int = 8, n_signs: int = 32
    ) -> None:
        _core.round_points(
            np.zeros((2, n), np.float32),
            np.eye(256, dtype=np.float32),
            np.ones((2, n_scales), np.float32),
            np.ones((group, n_points), np.float32),
            False,
            np.zeros((2, 64), np.uint16),
            np.zeros((2, n_signs), np.uint8),
            np.zeros((2, 256), np.float32),
        )

    call()
    with pytest.raises(ValueError, match="256 columns"):
        call(n=128)
    with pytest.raises(ValueError, match="4 or 8"):
        call(group=5)
    with pytest.raises(ValueError, match="multiple of 16"):
        call(n_points=17)
    with pytest.raises(ValueError, match="8, 16 or 32"):
        call(n_scales=4)
    with pytest.raises(ValueError, match=r"points must have the shape \(rows, 32\)"):
        call(group=8)
    with pytest.raises(ValueError, match=r"signs must have the shape \(rows, 32\)"):
        call(n_signs=8)
