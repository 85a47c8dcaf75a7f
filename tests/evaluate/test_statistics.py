"""The statistics against scipy and a few lines of numpy, on random data and on known tails."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ramgguf.core.errors import ResultError
from ramgguf.evaluate import bootstrap as uncertainty
from ramgguf.evaluate import statistics as robust
from ramgguf.evaluate.bootstrap import Estimate
from ramgguf.evaluate.statistics import DIVERGENCES, STATISTICS, SequenceDivergences, SequenceLosses


def random_losses(seed: int, n: int = 128, spread: float = 0.4) -> SequenceLosses:
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(100, 2048, n)
    return SequenceLosses(rng.normal(2.2, spread, n) * n_tokens, n_tokens)


def random_divergences(seed: int, n: int = 64) -> SequenceDivergences:
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(100, 2048, n)
    return SequenceDivergences(
        n_tokens=n_tokens,
        kld_sum=rng.gamma(2.0, 0.01, n) * n_tokens,
        n_same_top=rng.binomial(n_tokens, 0.95),
        delta_p_sum=rng.normal(0, 0.01, n) * n_tokens,
        delta_p_squared_sum=rng.gamma(2.0, 0.001, n) * n_tokens,
    )


def interval(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def width(estimate: Estimate) -> float:
    low, high = interval(estimate)
    return high - low


@pytest.mark.parametrize("seed", range(5))
def test_statistics_equal_numpy_and_scipy(seed: int) -> None:
    losses = random_losses(seed)
    per_token = losses.nll_sum / losses.n_tokens
    ppl = np.exp(per_token)
    expected = {
        "corpus_ppl": np.exp(np.average(per_token, weights=losses.n_tokens)),
        "median_ppl": np.median(ppl),
        "mean_ppl": np.mean(ppl),
        "geometric_mean_ppl": stats.gmean(ppl),
        "p95_ppl": np.percentile(ppl, 95),
        "p99_ppl": np.percentile(ppl, 99),
        "max_ppl": ppl.max(),
        "mad_ppl": stats.median_abs_deviation(ppl),
    }
    assert {k: s.of(losses) for k, s in STATISTICS.items()} == pytest.approx(expected, rel=1e-12)


def test_divergences_equal_numpy_over_tokens() -> None:
    rng = np.random.default_rng(3)
    n_tokens = rng.integers(5, 40, 30)
    splits = np.cumsum(n_tokens)[:-1]
    kld = rng.gamma(1.0, 0.02, n_tokens.sum())
    delta_p = rng.normal(0, 0.05, n_tokens.sum())
    same = rng.random(n_tokens.sum()) < 0.9

    def sums(x: np.ndarray) -> np.ndarray:
        return np.array([part.sum() for part in np.split(x, splits)])

    sample = SequenceDivergences(n_tokens, sums(kld), sums(same), sums(delta_p), sums(delta_p**2))
    expected = {
        "mean_kld": kld.mean(),
        "same_top_p": 100 * same.mean(),
        "mean_delta_p": 100 * delta_p.mean(),
        "rms_delta_p": 100 * np.sqrt(np.mean(delta_p**2)),
    }
    assert {k: s.of(sample) for k, s in DIVERGENCES.items()} == pytest.approx(expected, rel=1e-12)


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    data=st.data(),
    q=st.floats(0, 1),
)
def test_weighted_quantile_equals_numpy_on_repeated_values(
    values: list[float], data: st.DataObject, q: float
) -> None:
    n = len(values)
    counts = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
    found = robust.quantile(np.array(values), np.array(counts, dtype=float), q)
    expected = np.quantile(np.repeat(values, counts), q)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_counts_mean_the_same_as_repeating_sequences(seed: int) -> None:
    losses = random_losses(seed, n=20)
    counts = uncertainty.resample(losses, np.random.default_rng(seed), 4)
    for statistic in STATISTICS.values():
        many = statistic.function(losses, counts.astype(float))
        for row, found in zip(counts, many, strict=True):
            again = SequenceLosses(losses.nll_sum.repeat(row), losses.n_tokens.repeat(row))
            assert found == pytest.approx(statistic.of(again), rel=1e-12), statistic.label


@given(seed=st.integers(0, 1000), shift=st.floats(-1, 1))
@settings(max_examples=25, deadline=None)
def test_adding_a_constant_nll_scales_every_ppl(seed: int, shift: float) -> None:
    a = random_losses(seed, n=30)
    b = SequenceLosses(a.nll_sum + shift * a.n_tokens, a.n_tokens)
    for statistic in STATISTICS.values():
        assert statistic.of(b) == pytest.approx(np.exp(shift) * statistic.of(a), rel=1e-9)


@pytest.mark.parametrize("name", ["corpus_ppl", "median_ppl", "mean_ppl", "p95_ppl"])
def test_intervals_equal_scipys_percentile_bootstrap(name: str) -> None:
    losses = random_losses(11)
    counts = uncertainty.resample(losses, np.random.default_rng(1), 10_000)
    found = uncertainty.estimate(STATISTICS[name], losses, counts)

    def resampled(nll: np.ndarray, n: np.ndarray) -> float:
        return STATISTICS[name].of(SequenceLosses(nll, n))

    # SciPy renamed it in 1.15.
    known = inspect.signature(stats.bootstrap).parameters
    generator = "rng" if "rng" in known else "random_state"
    theirs = stats.bootstrap(
        (losses.nll_sum, losses.n_tokens),
        resampled,
        paired=True,
        vectorized=False,
        n_resamples=3000,
        method="percentile",
        **{generator: np.random.default_rng(2)},
    )
    low, high = theirs.confidence_interval
    assert interval(found) == pytest.approx((low, high), abs=0.06 * (high - low))


@pytest.mark.parametrize("name", ["corpus_ppl", "median_ppl", "mean_ppl"])
def test_intervals_cover_the_truth_about_95_percent_of_the_time(name: str) -> None:
    rng = np.random.default_rng(7)
    truth = {"corpus_ppl": np.exp(2.2), "median_ppl": np.exp(2.2), "mean_ppl": np.exp(2.28)}[name]
    n_tokens = np.full(128, 2047)
    hits = 0
    for _ in range(400):
        losses = SequenceLosses(rng.normal(2.2, 0.4, 128) * n_tokens, n_tokens)
        counts = uncertainty.resample(losses, rng, 500)
        found = uncertainty.estimate(STATISTICS[name], losses, counts)
        low, high = interval(found)
        hits += low <= truth <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_articles_are_drawn_whole_and_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(20), 6)
    n_tokens = np.full(120, 2047)
    nll = 2.2 + rng.normal(0, 0.4, 20)[group] + rng.normal(0, 0.05, 120)
    grouped = SequenceLosses(nll * n_tokens, n_tokens, group)
    alone = SequenceLosses(nll * n_tokens, n_tokens)
    counts = uncertainty.resample(grouped, rng, 2000)
    assert all((counts[:, group == g][:, 0] == counts[:, group == g].T).all() for g in range(20))
    wide = uncertainty.estimate(STATISTICS["corpus_ppl"], grouped, counts)
    narrow = uncertainty.estimate(
        STATISTICS["corpus_ppl"], alone, uncertainty.resample(alone, rng, 2000)
    )
    # six equal members per article carry the information of one: √6 ≈ 2.4 times as wide
    assert 1.9 < width(wide) / width(narrow) < 2.9


def test_no_interval_is_claimed_for_p99_or_the_maximum_of_128() -> None:
    losses = random_losses(1)
    counts = uncertainty.resample(losses, np.random.default_rng(0), 200)
    claimed = {
        k for k, s in STATISTICS.items() if uncertainty.estimate(s, losses, counts).low is not None
    }
    assert claimed == set(STATISTICS) - {"p99_ppl", "max_ppl"}
    assert STATISTICS["p99_ppl"].has_interval(random_losses(1, n=500))
    assert not STATISTICS["max_ppl"].has_interval(random_losses(1, n=5000))


def test_no_interval_is_claimed_from_a_handful_of_sequences_or_articles() -> None:
    few = random_losses(1, n=7)
    assert not any(s.has_interval(few) for s in STATISTICS.values())
    many = random_losses(1)
    three = SequenceLosses(many.nll_sum, many.n_tokens, np.arange(128) % 3)
    assert not any(s.has_interval(three) for s in STATISTICS.values())


def test_no_interval_is_claimed_for_a_mean_without_a_variance() -> None:
    rng = np.random.default_rng(23)
    wild = SequenceLosses(5 + rng.exponential(1.0, 200), np.ones(200, np.int64))
    assert not STATISTICS["mean_ppl"].has_interval(wild)
    assert STATISTICS["corpus_ppl"].has_interval(wild)
    assert STATISTICS["mean_ppl"].has_interval(random_losses(1))


def test_paired_difference_is_far_sharper_than_two_intervals() -> None:
    a = random_losses(2)
    rng = np.random.default_rng(3)
    noise = rng.normal(0.01, 0.02, 128) * a.n_tokens
    b = SequenceLosses(a.nll_sum + noise, a.n_tokens)
    counts = uncertainty.resample(a, rng, 4000)
    statistic = STATISTICS["corpus_ppl"]
    paired = uncertainty.paired_difference(statistic, b, a, counts)
    alone = uncertainty.estimate(statistic, a, counts)
    assert paired.value == pytest.approx(statistic.of(b) - statistic.of(a), rel=1e-12)
    low, high = interval(paired)
    assert 0 < low < paired.value < high
    assert width(paired) < 0.1 * width(alone)
    assert paired.p is not None
    assert paired.p < 0.001


def test_paired_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(13)
    n_tokens = np.full(128, 2047)
    p = []
    for _ in range(300):
        base = rng.normal(2.2, 0.4, 128)
        a, b = (
            SequenceLosses((base + rng.normal(0, 0.02, 128)) * n_tokens, n_tokens) for _ in "ab"
        )
        counts = uncertainty.resample(a, rng, 400)
        found = uncertainty.paired_difference(STATISTICS["corpus_ppl"], a, b, counts).p
        assert found is not None
        p.append(found)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert 0.40 <= np.mean(p) <= 0.60


def test_identical_models_differ_by_exactly_nothing() -> None:
    a = random_losses(4)
    counts = uncertainty.resample(a, np.random.default_rng(0), 500)
    for statistic in STATISTICS.values():
        found = uncertainty.paired_difference(statistic, a, a, counts)
        assert found.value == 0
        assert found.p in (None, 1.0)
    assert uncertainty.wilcoxon_p(a, a) == 1.0


def test_wilcoxon_equals_the_sum_of_signed_ranks() -> None:
    a, b = random_losses(5, n=60), random_losses(5, n=60, spread=0.41)
    delta = uncertainty.delta_nll(a, b)
    assert delta == pytest.approx(a.nll_sum / a.n_tokens - b.nll_sum / b.n_tokens)
    ranks = stats.rankdata(np.abs(delta))
    n = len(delta)
    plus = ranks[delta > 0].sum()
    z = (plus - n * (n + 1) / 4) / np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    assert uncertainty.wilcoxon_p(a, b) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)


def test_holm_follows_the_textbook_example() -> None:
    found = uncertainty.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_raw_and_the_bonferroni_values(p: list[float]) -> None:
    raw = np.array(p)
    adjusted = uncertainty.holm(raw)
    assert (adjusted >= raw - 1e-15).all()
    assert (adjusted <= np.minimum(1, raw * len(raw)) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(raw)]) >= -1e-15).all()


@pytest.mark.parametrize("alpha", [0.7, 1.5, 3.0])
def test_tail_index_recovers_a_pareto_exponent(alpha: float) -> None:
    rng = np.random.default_rng(17)
    found = [
        robust.tail(SequenceLosses(5 + rng.exponential(1 / alpha, 1280), np.ones(1280, np.int64)))
        for _ in range(20)
    ]
    mean = np.mean([t.index for t in found])
    assert 0.95 * alpha < mean < 1.08 * alpha
    assert np.mean([t.heavy for t in found]) == (1.0 if alpha < 2 else 0.0)


def test_ordinary_text_is_light_tailed_and_wild_sequences_make_it_heavy() -> None:
    ordinary = random_losses(19)
    light = robust.tail(ordinary)
    assert light.verdict == "light-tailed"
    assert 3 < light.index < 12
    assert 1.0 < light.mean_over_median < 1.2
    wild = ordinary.nll_sum.copy()
    wild[:5] = ordinary.n_tokens[:5] * np.log([25_000, 40_000, 50_000, 60_000, 81_000])
    heavy = robust.tail(SequenceLosses(wild, ordinary.n_tokens))
    assert heavy.verdict == "heavy-tailed"
    assert heavy.index < 1
    assert heavy.mean_over_median > 100


def test_a_tail_of_fewer_than_20_sequences_is_unknown() -> None:
    assert robust.tail(random_losses(1, n=19)).verdict == "unknown"
    assert robust.tail(random_losses(1, n=20)).verdict != "unknown"


def test_outliers_are_above_the_threshold_worst_first() -> None:
    losses = SequenceLosses(np.log([5.0, 101.0, 99.0, 5000.0]), np.ones(4, np.int64))
    assert robust.outliers(losses).tolist() == [3, 1]
    assert robust.outliers(losses, 98.0).tolist() == [3, 1, 2]
    assert robust.outliers(losses, 5000.1).tolist() == []


def test_absurd_losses_stay_finite() -> None:
    losses = SequenceLosses(np.array([1e5] * 10 + [2.0] * 10), np.ones(20, np.int64))
    values = [s.of(losses) for s in STATISTICS.values()]
    assert np.isfinite(values).all()
    assert max(values) == pytest.approx(np.exp(700), rel=1e-9)


@pytest.mark.parametrize(
    ("nll", "n_tokens", "message"),
    [
        ([], [], "at least one sequence"),
        ([1.0], [0], "at least one token"),
        ([1.0, 2.0], [1], "nll_sum has shape \\(2,\\), expected \\(1,\\)"),
        ([1.0, np.nan], [1, 1], "nll_sum of sequence 1 is not finite"),
        ([np.inf, 1.0], [1, 1], "nll_sum of sequence 0 is not finite"),
    ],
)
def test_malformed_losses_are_refused(nll: list[float], n_tokens: list[int], message: str) -> None:
    with pytest.raises(ResultError, match=message):
        SequenceLosses(np.array(nll), np.array(n_tokens, dtype=np.int64))


def test_pairing_different_sequences_is_refused() -> None:
    with pytest.raises(ResultError, match="same sequences"):
        uncertainty.delta_nll(random_losses(1), random_losses(2))
    with pytest.raises(ResultError, match="same sequences"):
        uncertainty.delta_nll(random_losses(1), random_losses(1, n=5))


def test_the_same_seed_gives_the_same_intervals() -> None:
    sample = random_divergences(1)

    def once() -> Estimate:
        counts = uncertainty.resample(sample, np.random.default_rng(9), 500)
        return uncertainty.estimate(DIVERGENCES["rms_delta_p"], sample, counts)

    assert once() == once()
