"""Corrections for quantized inputs: exact sums, and no harm to other tokens than theirs."""

import numpy as np
import pytest

from feedback_inputs import Floats, correlated, weights
from ramgguf.quants.correction import RIDGE, ChangedInputs, InputSums

N = 48
RNG = np.random.default_rng(7)
LOSS = (0.2 * RNG.standard_normal((N, N)) / np.sqrt(N)).astype(np.float32)


def _lossy(x: Floats, seed: int) -> Floats:
    """Return inputs that have lost what is linear in them, and some noise."""
    noise = np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32)
    lossy: Floats = x - x @ LOSS + np.float32(0.05) * noise
    return lossy


def _summed(x: Floats, x_hat: Floats) -> InputSums:
    sums = InputSums(x.shape[1], threads=1)
    for half in range(2):
        sums.add(half, x[half::2], x_hat[half::2])
    return sums


def _changed(x: Floats, x_hat: Floats) -> ChangedInputs:
    return _summed(x, x_hat).changed_inputs()


def _error(w: Floats, rounded: Floats, x: Floats, x_hat: Floats) -> float:
    return float(np.square(x @ w.T - x_hat @ rounded.T).mean())


def test_sums_that_come_in_parts_are_those_of_all_tokens() -> None:
    x = correlated(N, 200, 1)
    x_hat = _lossy(x, 2)
    sums = InputSums(N, threads=2)
    for start, end in ((0, 90), (90, 91), (91, 200)):
        sums.add(0, x[start:end], x_hat[start:end])
        sums.add(1, x[start:end:2], x_hat[start:end:2])
    sums.add(1, x[:0], x_hat[:0])
    found = sums.changed_inputs()
    exact = x_hat.astype(np.float64)
    assert found.n_tokens == (200, 101)
    every_other = [*range(0, 90, 2), 90, *range(91, 200, 2)]
    for half, rows in zip(found.halves, (list(range(200)), every_other), strict=True):
        a, lost = exact[rows], (x.astype(np.float64) - exact)[rows]
        np.testing.assert_allclose(half.gram, a.T @ a / len(a), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(half.cross, lost.T @ a / len(a), rtol=1e-4, atol=1e-4)


def test_what_inputs_have_lost_is_made_up_for_on_tokens_that_were_not_met() -> None:
    x, fresh = np.split(correlated(N, 4000, 1), 2)
    x_hat, fresh_hat = _lossy(x, 2), _lossy(fresh, 4)
    w = weights(32, N, 5)
    found = _changed(x, x_hat)
    assert found.strength(w) > 0.9
    corrected = found.corrected(w)
    before, after = (_error(w, v, fresh, fresh_hat) for v in (w, corrected))
    assert after < 0.5 * before


def test_the_change_is_the_paper_s_with_a_ridge_times_its_strength() -> None:
    x = correlated(N, 500, 1)
    x_hat = _lossy(x, 2)
    found = _changed(x, x_hat)
    a, lost = x_hat.astype(np.float64), (x - x_hat).astype(np.float64)
    gram = a.T @ a
    ridged = gram + RIDGE * np.trace(gram) / N * np.eye(N)
    for n_rows in (8, 2 * N):  # fewer rows than columns are solved for, and more
        w = weights(n_rows, N, 5)
        change = w @ (lost.T @ a) @ np.linalg.inv(ridged)
        np.testing.assert_allclose(
            found.corrected(w), w + found.strength(w) * change, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("n_tokens", [N, 4 * N, 40 * N])
def test_few_tokens_and_losses_that_nothing_explains_do_no_harm(n_tokens: int) -> None:
    """With a ridge of 1 % and all of the change, N tokens make the error 1.5 times as large."""
    x_hat = correlated(N, n_tokens + 4000, 1)
    x = x_hat + np.random.default_rng(11).standard_normal(x_hat.shape).astype(np.float32)
    w = weights(64, N, 5)
    found = _changed(x[:n_tokens], x_hat[:n_tokens])
    fresh = x[n_tokens:], x_hat[n_tokens:]
    assert 0 <= found.strength(w) < 0.1
    assert _error(w, found.corrected(w), *fresh) < 1.01 * _error(w, w, *fresh)


def test_inputs_that_lost_nothing_leave_the_weights_as_they_are() -> None:
    x, w = correlated(N, 300, 1), weights(16, N, 5)
    found = _changed(x, x)
    assert found.strength(w) == 0
    assert found.corrected(w) is w


def test_other_shapes_and_halves_without_tokens_are_refused() -> None:
    x = correlated(N, 10, 1)
    sums = InputSums(N, threads=1)
    with pytest.raises(ValueError, match=r"inputs \(10, 48\) and \(9, 48\) of 48 columns"):
        sums.add(0, x, x[1:])
    with pytest.raises(ValueError, match="of 48 columns"):
        sums.add(0, x[:, :9], x[:, :9])
    sums.add(0, x, x)
    with pytest.raises(ValueError, match="no tokens in a half"):
        sums.changed_inputs()
