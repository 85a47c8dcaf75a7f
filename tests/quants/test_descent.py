"""Coordinate descent on encoded rows: against its definition, and against its start."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from feedback_inputs import correlated, hessian_of, importance_of, weights
from ramgguf import _core
from ramgguf.quants import formats
from ramgguf.quants.encoders import descent, gptq

Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]

N = 512


def _mean(n: int, seed: int) -> Floats:
    x = correlated(n, 4 * n, seed)
    return np.ascontiguousarray((x.T @ x) / len(x), np.float32)


def _rounded(name: str, w: Floats) -> Blocks:
    blocks = np.empty((len(w), formats.row_bytes(name, w.shape[1])), np.uint8)
    _core.encode(name, "F32", w.view(np.uint8), blocks, encoder="rtn")
    return blocks


def _decoded(name: str, blocks: Blocks, n: int) -> Floats:
    out = np.empty((len(blocks), n), np.float32)
    _core.decode(name, blocks, out)
    return out


def _errors(name: str, w: Floats, mean: Floats, blocks: Blocks) -> NDArray[np.float64]:
    e = (w - _decoded(name, blocks, w.shape[1])).astype(np.float64)
    found: NDArray[np.float64] = np.einsum("ij,jk,ik->i", e, mean.astype(np.float64), e)
    return found


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_every_row_comes_out_better_and_the_errors_are_true(name: str) -> None:
    w, mean = weights(50, N, 1), _mean(N, 1)
    blocks = _rounded(name, w)
    before = _errors(name, w, mean, blocks)
    told = _core.descend(name, w, mean, blocks, 4)
    after = _errors(name, w, mean, blocks)
    np.testing.assert_allclose(told[:, 0], before, rtol=1e-3)
    np.testing.assert_allclose(told[:, 1], after, rtol=1e-2)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.8 * before.sum()


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_it_starts_from_error_feedback_and_ends_below(name: str) -> None:
    hessian, w = hessian_of(N, 5), weights(24, N, 5)
    importance = importance_of(hessian)
    start = gptq.encode(name, w, hessian, importance)
    end = descent.encode(name, w, hessian, importance)
    damped = hessian.damped
    before, after = (_errors(name, w, damped, blocks) for blocks in (start, end))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.95 * before.sum()


def test_no_other_code_of_any_single_weight_is_better() -> None:
    """Q8_0 with the scale as it ends up: every weight's level is the best one, given the others."""
    w, mean = weights(3, 64, 2), _mean(64, 2)
    blocks = _rounded("Q8_0", w)
    _core.descend("Q8_0", w, mean, blocks, 50)
    best = _errors("Q8_0", w, mean, blocks)
    for k, move in itertools.product(range(64), (-1, 1)):
        other = blocks.copy()
        at = k // 32 * 34 + 2 + k % 32
        level = other[:, at].view(np.int8).astype(int) + move
        other[:, at] = np.clip(level, -127, 127).astype(np.int8).view(np.uint8)
        assert (_errors("Q8_0", w, mean, other) >= best * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_without_correlation_and_with_the_best_scales_nothing_changes(name: str) -> None:
    """Weights that their blocks hold exactly have no error, so that nothing is left to do."""
    blocks = _rounded(name, weights(3, N, 3))
    grid, before = _decoded(name, blocks, N), blocks.copy()
    told = _core.descend(name, grid, np.eye(N, dtype=np.float32), blocks, 3)
    assert np.array_equal(blocks, before)
    assert not told.any()


def test_rows_are_independent_and_runs_repeat() -> None:
    w, mean = weights(101, 256, 7), _mean(256, 7)

    def run(rows: slice) -> Blocks:
        blocks = _rounded("Q3_K", w[rows])
        _core.descend("Q3_K", w[rows], mean, blocks, 3)
        return blocks

    whole = run(slice(None))
    assert np.array_equal(whole, run(slice(None)))
    assert np.array_equal(whole[37:60], run(slice(37, 60)))


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_all_levels_descend_alike(name: str) -> None:
    w, mean = weights(5, N + (0 if formats.get(name).block_size == 256 else 64), 8), None
    mean = _mean(w.shape[1], 8)
    before = _core.isa()
    found = []
    try:
        for level in _core.supported_isas():
            _core.set_isa(level)
            blocks = _rounded(name, w)
            _core.descend(name, w, mean, blocks, 2)
            found.append(blocks)
    finally:
        _core.set_isa(before)
    assert all(np.array_equal(blocks, found[0]) for blocks in found)


def test_inputs_that_never_were_active_and_rows_of_zeros_do_no_harm() -> None:
    w, mean = weights(4, 256, 9), _mean(256, 9)
    mean[5], mean[:, 5] = 0, 0
    w[2] = 0
    for name in sorted(gptq.SCALAR_FORMATS):
        blocks = _rounded(name, w)
        before = _errors(name, w, mean, blocks)
        _core.descend(name, w, mean, blocks, 3)
        assert np.isfinite(_decoded(name, blocks, 256)).all()
        assert (_errors(name, w, mean, blocks) <= before * (1 + 1e-5)).all()


def test_what_does_not_fit_is_refused() -> None:
    def call(name: str, *, n: int = 256, n_bytes: int = 144, sweeps: int = 1) -> None:
        w, blocks = np.zeros((2, 256), np.float32), np.zeros((2, n_bytes), np.uint8)
        _core.descend(name, w, np.eye(n, dtype=np.float32), blocks, sweeps)

    call("Q4_K")
    with pytest.raises(ValueError, match=r"hessian must have the shape \(256, 256\)"):
        call("Q4_K", n=128)
    with pytest.raises(ValueError, match=r"blocks must have the shape \(2, 144\)"):
        call("Q4_K", n_bytes=12)
    with pytest.raises(ValueError, match="n_sweeps must be at least 1"):
        call("Q4_K", sweeps=0)
    with pytest.raises(ValueError, match="F16"):
        call("F16", n_bytes=512)
