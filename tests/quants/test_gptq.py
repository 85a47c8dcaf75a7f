"""GPTQ: rounding with error feedback into real blocks, against its definition."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from feedback_inputs import correlated, weights
from ramgguf import _core
from ramgguf.quants.encoders import gptq, points
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian

Floats = NDArray[np.float32]


def _decoded(name: str, blocks: NDArray[np.uint8], n: int) -> Floats:
    return decode_rows(name, blocks, n)


def _searched(name: str, w: Floats, importance: Floats) -> NDArray[np.uint8]:
    return points.searched(name, w, importance)


def test_the_root_is_an_upper_triangular_one_of_the_damped_hessian() -> None:
    x = correlated(300, 900, 0)
    hessian = Hessian.of(x.T @ x, 900)
    damped = hessian.mean.astype(np.float64) + 0.01 * np.diag(hessian.mean).mean() * np.eye(300)
    g = hessian.root.astype(np.float64)
    np.testing.assert_allclose(g @ g.T, damped, rtol=1e-5, atol=1e-5 * np.abs(damped).max())
    assert not np.tril(g, -1).any()


def test_units_are_the_diagonal_blocks_of_the_inverse_of_the_root() -> None:
    x = correlated(300, 900, 0)
    hessian = Hessian.of(x.T @ x, 900)
    u = np.linalg.inv(hessian.root.astype(np.float64))
    whole, part = hessian.units
    np.testing.assert_allclose(whole, u[:256, :256], atol=1e-4 * np.abs(u).max())
    np.testing.assert_allclose(part[:44, :44], u[256:, 256:], atol=1e-4 * np.abs(u).max())
    assert np.array_equal(part[44:], np.eye(256)[44:])
    assert not part[:44, 44:].any()


def test_damped_errors_are_those_of_the_damped_hessian() -> None:
    x, w = correlated(300, 900, 2), weights(6, 300, 2)
    hessian = Hessian.of(x.T @ x, 900)
    damped = hessian.damped.astype(np.float64)
    np.testing.assert_allclose(hessian.damped_errors(w), ((w @ damped) * w).sum(1), rtol=1e-4)


def test_inputs_that_never_were_active_do_no_harm() -> None:
    x = correlated(32, 100, 1)
    x[:, 5] = 0
    hessian = Hessian.of(x.T @ x, 100)
    assert np.isfinite(hessian.root).all()
    assert np.isfinite(hessian.units[0]).all()
    assert np.isfinite(Hessian.of(np.zeros((32, 32), np.float32), 100).units[0]).all()


def test_the_error_is_that_of_the_output() -> None:
    x, w = correlated(40, 300, 2), weights(6, 40, 2)
    hessian = Hessian.of(x.T @ x, 300)
    expected = np.square(x.astype(np.float64) @ w.T).sum() / 300
    assert hessian.error(w) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_without_correlation_it_is_the_search(name: str) -> None:
    w = weights(3, 512, 3)
    importance = np.random.default_rng(4).uniform(0.5, 2, 512).astype(np.float32)
    hessian = Hessian.of(np.eye(512, dtype=np.float32), 1)
    blocks = gptq.encode(name, w, hessian, importance)
    assert np.array_equal(blocks, _searched(name, w, importance))


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS | points.FORMATS))
def test_the_outputs_error_falls_below_that_of_the_search(name: str) -> None:
    x, w = correlated(512, 2000, 5), weights(24, 512, 5)
    hessian = Hessian.of(x.T @ x, 2000)
    importance = np.ascontiguousarray(np.diag(hessian.mean))
    with_feedback = _decoded(name, gptq.encode(name, w, hessian, importance), 512)
    without = _decoded(name, _searched(name, w, importance), 512)
    ratio = hessian.error(w - with_feedback) / hessian.error(w - without)
    assert 0.01 < ratio < 0.9


@pytest.mark.parametrize("name", sorted(gptq.SCALAR_FORMATS))
def test_what_is_fed_back_stays_within_the_range_of_a_block(name: str) -> None:
    """The second input is the first on a fifth of its scale, so it is given five times its error.

    Its weight is the largest of the block that the scale is made for.
    """
    rng = np.random.default_rng(9)
    x = rng.standard_normal((2000, 256)).astype(np.float32)
    x[:, 1] = 0.2 * x[:, 0] + 0.01 * x[:, 1]
    w = rng.uniform(-0.7, 0.7, (200, 256)).astype(np.float32)
    w[:, 1] = np.where(np.arange(200) % 2, 1, -1)
    hessian = Hessian.of(x.T @ x, 2000)
    importance = np.ascontiguousarray(np.diag(hessian.mean))
    swept = _decoded(name, gptq._swept(name, w, hessian, importance)[0], 256)
    assert (np.sign(swept[:, 1]) == np.sign(w[:, 1])).all()
    assert np.abs(swept).max() < 3


def test_no_row_comes_out_worse_than_searched() -> None:
    """Inputs that hardly go together: what feedback brings is small, and not for every row."""
    x = np.random.default_rng(1).standard_normal((6000, 256)).astype(np.float32)
    w, flat = weights(60, 256, 9), np.ones(256, np.float32)
    hessian = Hessian.of(x.T @ x, 6000)
    kept = _decoded("Q4_0", gptq.encode("Q4_0", w, hessian, flat), 256)
    swept = _decoded("Q4_0", gptq._swept("Q4_0", w, hessian, flat)[0], 256)
    searched = _decoded("Q4_0", _searched("Q4_0", w, flat), 256)
    errors = [hessian.errors(w - q) for q in (kept, swept, searched)]
    assert (errors[1] > errors[2]).any()  # or there was nothing to keep out
    np.testing.assert_allclose(errors[0], np.minimum(errors[1], errors[2]), rtol=1e-6)


def test_what_a_sweep_hands_on_is_the_error_of_the_damped_output() -> None:
    x = correlated(576, 2000, 6)
    x[:, 3] = 0  # an input that never was active
    w, hessian = weights(40, 576, 6), Hessian.of(x.T @ x, 2000)
    importance = np.ascontiguousarray(np.diag(hessian.mean))
    blocks, handed_on, _ = gptq._swept("Q8_0", w, hessian, importance)
    e = (w - _decoded("Q8_0", blocks, 576)).astype(np.float64)
    damped = hessian.mean.astype(np.float64) + np.diag(hessian.damping)
    np.testing.assert_allclose(handed_on, ((e @ damped) * e).sum(1), rtol=1e-3)


def test_every_column_is_rounded_to_the_level_nearest_to_what_feedback_made_of_it() -> None:
    n = 576  # two superblocks' worth and a quarter
    x, w = correlated(n, 2000, 6), weights(4, n, 6)
    hessian = Hessian.of(x.T @ x, 2000)
    blocks = gptq.encode("Q8_0", w, hessian, np.ones(n, np.float32))
    q = _decoded("Q8_0", blocks, n).astype(np.float64)
    steps = blocks.reshape(4, n // 32, 34)[:, :, :2].copy().view(np.float16)[..., 0]
    u, left = np.linalg.inv(hessian.root.astype(np.float64)), w.astype(np.float64)
    for k in range(n):
        off = left[:, k] - q[:, k]
        # The last bits of a step are rounded to F16 after the weights were rounded with it.
        assert (np.abs(off) <= 0.56 * steps[:, k // 32]).all()
        left[:, k:] -= np.outer(off / u[k, k], u[k, k:])


def test_rows_are_independent_and_runs_repeat() -> None:
    x, w = correlated(256, 600, 7), weights(9, 256, 7)
    hessian, importance = Hessian.of(x.T @ x, 600), np.ones(256, np.float32)
    whole = gptq.encode("Q3_K", w, hessian, importance)
    assert np.array_equal(whole, gptq.encode("Q3_K", w, hessian, importance))
    assert np.array_equal(whole[4:7], gptq.encode("Q3_K", w[4:7], hessian, importance))


def test_all_levels_round_a_unit_alike() -> None:
    x, w = correlated(256, 600, 8), weights(5, 256, 8)
    hessian, importance = Hessian.of(x.T @ x, 600), np.ones(256, np.float32)
    before = _core.isa()
    try:
        found = []
        for level in _core.supported_isas():
            _core.set_isa(level)
            found.append(gptq.encode("Q4_K", w, hessian, importance))
    finally:
        _core.set_isa(before)
    assert all(np.array_equal(blocks, found[0]) for blocks in found)


def test_what_does_not_fit_is_refused() -> None:
    def call(name: str, n: int, *, n_out: int | None = None) -> None:
        n_bytes = 144 if n_out is None else n_out
        _core.round_unit(
            name,
            np.zeros((2, n), np.float32),
            np.eye(256, dtype=np.float32),
            np.ones(256, np.float32),
            np.zeros((2, n_bytes), np.uint8),
            np.zeros((2, n), np.float32),
        )

    call("Q4_K", 256)
    with pytest.raises(ValueError, match="no whole blocks of Q4_K"):
        call("Q4_K", 128)
    with pytest.raises(ValueError, match="no error feedback"):
        call("F16", 256)
    with pytest.raises(ValueError, match=r"out must have the shape \(rows, 144\)"):
        call("Q4_K", 256, n_out=10)
    with pytest.raises(ValueError, match="up to 256 columns"):
        call("Q4_0", 512)


def test_a_scale_that_would_overflow_is_refused() -> None:
    w = np.full((1, 256), 1e9, np.float32)
    hessian = Hessian.of(np.eye(256, dtype=np.float32), 1)
    with pytest.raises(ValueError, match="would overflow F16"):
        gptq.encode("Q4_0", w, hessian, np.ones(256, np.float32))


def test_the_hessian_file_of_another_model_is_refused(tmp_path: Path) -> None:
    from ramgguf.core.errors import ImatrixError
    from ramgguf.quants.hessian import gram_name, load_hessians, new_hessians

    path = tmp_path / "h.gguf"
    with new_hessians(path, {"a": "a", "b": "a"}, {"a": 64}, 10, force=False) as file:
        file.write(gram_name("a"), np.eye(64, dtype=np.float32))
        file.commit()
    hessians = load_hessians(path)
    assert hessians.get("c", 64) is None
    assert hessians.factored("a", 64) is hessians.factored("b", 64)
    with pytest.raises(ImatrixError, match="has 32 columns"):
        hessians.get("b", 32)
    with pytest.raises(ImatrixError, match="has 32 columns"):
        hessians.factored("b", 32)  # though the owner's is kept
    hessians.close()


def test_what_no_inputs_make_is_named_by_file_and_tensor(tmp_path: Path) -> None:
    from ramgguf.core.errors import ImatrixError
    from ramgguf.quants.hessian import gram_name, load_hessians, new_hessians

    indefinite = np.ones((64, 64), np.float32) + np.diag(np.arange(64, dtype=np.float32) - 40)
    lopsided = np.triu(np.ones((64, 64), np.float32))
    for number, (gram, message) in enumerate(
        ((indefinite, "not positive definite"), (lopsided, "not symmetric"))
    ):
        path = tmp_path / f"{number}.gguf"
        with new_hessians(path, {"a": "a"}, {"a": 64}, 10, force=False) as file:
            file.write(gram_name("a"), gram)
            file.commit()
        hessians = load_hessians(path)
        with pytest.raises(ImatrixError, match=rf"{number}\.gguf: a\.gram.*{message}"):
            hessians.factored("a", 64)
        hessians.close()
