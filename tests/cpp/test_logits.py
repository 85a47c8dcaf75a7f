"""The C++ pass over rows of logits, against float64 NumPy and SciPy."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr

from ramgguf import _core

ISAS = _core.supported_isas()
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]


@pytest.fixture(autouse=True)
def _same_isa_afterwards() -> Iterator[None]:
    active = _core.isa()
    yield
    _core.set_isa(active)


def rows(n: int, n_vocab: int, *, seed: int = 0, scale: float = 4.0) -> tuple[Floats, Ids]:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((n, n_vocab)) * scale).astype(np.float32)
    return logits, rng.integers(0, n_vocab, n).astype(np.int32)


@pytest.mark.parametrize("n_vocab", [1, 2, 15, 16, 17, 63, 64, 65, 257, 4999, 32000])
def test_scores_equal_scipy(n_vocab: int) -> None:
    logits, targets = rows(9, n_vocab)
    found = _core.score_logits(logits, targets)
    exact = logits.astype(np.float64)
    expected = -log_softmax(exact, axis=1)[np.arange(9), targets]
    np.testing.assert_allclose(found["log_sum_exp"], logsumexp(exact, axis=1), atol=2e-7)
    np.testing.assert_allclose(found["nll"], expected, atol=2e-7)
    np.testing.assert_allclose(found["target_p"], np.exp(-expected), rtol=3e-7)
    np.testing.assert_array_equal(found["top"], logits.argmax(axis=1))
    assert not found["broken"].any()


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 5.0])
def test_divergences_equal_scipy(spread: float) -> None:
    base, targets = rows(50, 5001, seed=1)
    noise, _ = rows(50, 5001, seed=2, scale=spread)
    candidate = base + noise + np.float32(3)
    p = np.exp(log_softmax(base.astype(np.float64), axis=1))
    q = np.exp(log_softmax(candidate.astype(np.float64), axis=1))
    found = _core.compare_logits(base, candidate, targets)
    np.testing.assert_allclose(found["kld"], rel_entr(p, q).sum(axis=1), rtol=2e-6, atol=3e-7)
    at = (np.arange(50), targets)
    np.testing.assert_allclose(found["delta_p"], q[at] - p[at], atol=1e-6)
    np.testing.assert_array_equal(found["same_top"], base.argmax(1) == candidate.argmax(1))
    for side, logits in (("reference", base), ("candidate", candidate)):
        alone = _core.score_logits(logits, targets)
        np.testing.assert_array_equal(found[side], alone)


def test_kld_of_equal_rows_is_exactly_zero() -> None:
    logits, targets = rows(20, 12345)
    found = _core.compare_logits(logits, logits.copy(), targets)
    assert (found["kld"] == 0).all()
    assert (found["delta_p"] == 0).all()
    assert found["same_top"].all()


def test_kld_counts_the_reference_as_the_truth() -> None:
    # p = (1/2, 1/2) and q = (1/4, 3/4): KL(p‖q) is 0.1438, KL(q‖p) 0.1308.
    base = np.log(np.array([[0.5, 0.5]], dtype=np.float32))
    candidate = np.log(np.array([[0.25, 0.75]], dtype=np.float32))
    found = _core.compare_logits(base, candidate, np.zeros(1, dtype=np.int32))
    assert found["kld"][0] == pytest.approx(0.14384, abs=1e-5)
    assert found["delta_p"][0] == pytest.approx(-0.25, abs=1e-6)


def test_the_lowest_token_wins_a_tie() -> None:
    logits = np.zeros((1, 100), dtype=np.float32)
    logits[0, [37, 53, 99]] = 2
    assert _core.score_logits(logits, np.zeros(1, dtype=np.int32))["top"][0] == 37


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 16, 70, 99])
def test_nan_and_inf_break_their_row_only(bad: float, position: int) -> None:
    logits, targets = rows(3, 100)
    logits[1, position] = bad
    assert _core.score_logits(logits, targets)["broken"].tolist() == [0, 1, 0]
    clean, _ = rows(3, 100)
    for pair in ((logits, clean), (clean, logits)):
        assert _core.compare_logits(*pair, targets)["broken"].tolist() == [0, 1, 0]


def test_tokens_of_probability_zero_count_nothing() -> None:
    logits, targets = rows(4, 90)
    masked = logits.copy()
    unused = [int(t) for t in np.setdiff1d(np.arange(90), targets)[:30]]
    masked[:, unused] = -np.inf
    kept = np.delete(logits, unused, axis=1)
    expected = logsumexp(kept.astype(np.float64), axis=1)
    found = _core.compare_logits(masked, masked, targets)
    np.testing.assert_allclose(found["reference"]["log_sum_exp"], expected, atol=2e-7)
    assert (found["kld"] == 0).all()
    assert not found["broken"].any()


def test_an_impossible_target_breaks_its_row() -> None:
    logits, targets = rows(2, 90)
    logits[0, targets[0]] = -np.inf
    assert _core.score_logits(logits, targets)["broken"].tolist() == [1, 0]
    nothing = np.full((1, 90), -np.inf, dtype=np.float32)
    assert _core.score_logits(nothing, targets[:1])["broken"][0] == 1


def test_a_token_that_only_the_candidate_excludes_breaks_the_pair() -> None:
    base, targets = rows(1, 90)
    candidate = base.copy()
    candidate[0, (targets[0] + 1) % 90] = -np.inf
    assert _core.compare_logits(base, candidate, targets)["broken"][0] == 1


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=200),
    st.integers(0, 2**32 - 1),
)
def test_every_isa_level_gives_the_same_bits(values: list[float], seed: int) -> None:
    logits = np.array([values], dtype=np.float32)
    rng = np.random.default_rng(seed)
    other = logits + rng.standard_normal(logits.shape).astype(np.float32)
    target = np.array([seed % len(values)], dtype=np.int32)
    found = set()
    for isa in ISAS:
        _core.set_isa(isa)
        scores = _core.score_logits(logits, target).tobytes()
        found.add((scores, _core.compare_logits(logits, other, target).tobytes()))
    assert len(found) == 1


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_below_two_ulp(isa: str) -> None:
    _core.set_isa(isa)
    x = -np.linspace(0, 87, 1_000_003).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    errors = np.abs(_core.exp_nonpositive(x) - exact) / ulp
    assert errors.max() < 1.5
    edges = np.array([0, -0.0, -88, -1e30, -np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(_core.exp_nonpositive(edges), [1, 1, 0, 0, 0, np.nan])


def test_arrays_that_do_not_fit_are_refused() -> None:
    logits, targets = rows(3, 20)
    with pytest.raises(ValueError, match="one entry for each of the 3 rows"):
        _core.score_logits(logits, targets[:2])
    with pytest.raises(ValueError, match="target 20 of row 1 is outside the vocabulary of 20"):
        _core.score_logits(logits, np.array([0, 20, 0], dtype=np.int32))
    with pytest.raises(ValueError, match="same shape"):
        _core.compare_logits(logits, logits[:, :10].copy(), targets)
    with pytest.raises(TypeError):
        _core.score_logits(logits.astype(np.float64), targets)
    with pytest.raises(TypeError):
        _core.score_logits(logits[:, ::2], targets)
