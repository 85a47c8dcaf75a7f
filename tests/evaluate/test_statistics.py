"""The statistics against scipy and a few lines of numpy, on random data and on known tails."""

import inspect
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ramgguf.core.errors import ResultError
from ramgguf.evaluate import intervals, significance
from ramgguf.evaluate import statistics as robust
from ramgguf.evaluate.intervals import Estimate
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

    first = np.concatenate([np.arange(n) < 3 for n in n_tokens])
    sample = SequenceDivergences(
        n_tokens,
        sums(kld),
        sums(same),
        sums(delta_p),
        sums(delta_p**2),
        n_first=np.full(30, 3),
        first_kld_sum=sums(kld * first),
    )
    expected = {
        "mean_kld": kld.mean(),
        "late_kld": kld[~first].mean(),
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
    counts = intervals.resample(losses, np.random.default_rng(seed), 4)
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


def test_corpus_and_mean_intervals_equal_students_t_where_sequences_weigh_the_same() -> None:
    nll = np.random.default_rng(11).normal(2.2, 0.4, 25)
    losses = SequenceLosses(nll * 2047, np.full(25, 2047))
    found = intervals.estimate(STATISTICS["corpus_ppl"], losses)
    theirs = stats.t.interval(0.95, 24, loc=nll.mean(), scale=stats.sem(nll))
    assert interval(found) == pytest.approx(np.exp(theirs), rel=1e-9)


def test_a_large_sample_has_the_interval_of_scipys_bca_bootstrap() -> None:
    losses = random_losses(11, n=400)
    found = intervals.estimate(STATISTICS["corpus_ppl"], losses)
    # SciPy renamed it in 1.15.
    known = inspect.signature(stats.bootstrap).parameters
    generator = "rng" if "rng" in known else "random_state"
    theirs = stats.bootstrap(
        (losses.nll_sum, losses.n_tokens),
        lambda nll, n, axis: np.exp(nll.sum(axis) / n.sum(axis)),
        paired=True,
        n_resamples=3000,
        method="BCa",
        **{generator: np.random.default_rng(2)},
    )
    low, high = theirs.confidence_interval
    assert interval(found) == pytest.approx((low, high), abs=0.08 * (high - low))


def made_text(
    rng: np.random.Generator, units: int, per_unit: int, icc: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return a normal value per sequence, units of unequal length, and each one's unit."""
    sizes = np.ones(units, int) if per_unit == 1 else 1 + rng.poisson(per_unit - 1, units)
    group = np.repeat(np.arange(units), sizes)
    shared, own = rng.normal(size=units)[group], rng.normal(size=len(group))
    return spread * (np.sqrt(icc) * shared + np.sqrt(1 - icc) * own), group


TEXTS = [(8, 1, 0.0), (8, 3, 0.3), (12, 3, 0.4), (55, 2, 0.2)]


@pytest.mark.parametrize(("units", "per_unit", "icc"), TEXTS)
def test_intervals_cover_the_truth_93_percent_of_the_time_from_8_units_on(
    units: int, per_unit: int, icc: float
) -> None:
    rng = np.random.default_rng(8)
    n_worlds = 500
    truths = {
        "corpus_ppl": np.exp(2.2),
        "median_ppl": np.exp(2.2),
        "geometric_mean_ppl": np.exp(2.2),
    }
    hits = dict.fromkeys((*truths, "share", "median_delta", "ratio"), 0)
    for _ in range(n_worlds):
        noise, group = made_text(rng, units, per_unit, icc, 0.4)
        tokens = np.full(len(noise), 2047)
        losses = SequenceLosses((2.2 + noise) * 2047, tokens, group)
        for name, truth in truths.items():
            low, high = interval(intervals.estimate(STATISTICS[name], losses))
            hits[name] += low <= truth <= high
        change = 0.02 * noise / 0.4
        other = SequenceLosses(losses.nll_sum + change * 2047, tokens, group)
        found = significance.paired_sequences(other, losses)
        ratio = significance.paired_ratio(STATISTICS["corpus_ppl"], other, losses)
        for name, estimate, truth in (
            ("share", found.share, 0.5),
            ("median_delta", found.median_delta, 0.0),
            ("ratio", ratio, 1.0),
        ):
            low, high = interval(estimate)
            hits[name] += low <= truth <= high
    covered = {name: n / n_worlds for name, n in hits.items()}
    # 93 % less two standard errors of 500 worlds; exact tests of few units cover up to all
    assert min(covered.values()) >= 0.93 - 0.022, covered
    assert covered["corpus_ppl"] <= 0.98, covered
    assert np.mean(list(covered.values())) >= 0.94, covered


@pytest.mark.parametrize(("units", "per_unit", "icc"), TEXTS)
def test_paired_tests_reject_at_most_6_percent_of_true_nulls(
    units: int, per_unit: int, icc: float
) -> None:
    rng = np.random.default_rng(3)
    n_worlds = 300
    rejected = dict.fromkeys(("corpus_ppl", "median_ppl", "sign", "wilcoxon"), 0)
    for _ in range(n_worlds):
        change, group = made_text(rng, units, per_unit, icc, 0.02)
        base = 2.2 + rng.normal(0, 0.3, units)[group]
        tokens = np.full(len(change), 2047)
        a = SequenceLosses((base + change) * 2047, tokens, group)
        b = SequenceLosses(base * 2047, tokens, group)
        for name in ("corpus_ppl", "median_ppl"):
            p = significance.paired_ratio(STATISTICS[name], a, b, rng, 200).p
            assert p is not None
            rejected[name] += p < 0.05
        found = significance.paired_sequences(a, b)
        rejected["sign"] += found.p_sign < 0.05
        rejected["wilcoxon"] += found.p_wilcoxon < 0.05
    rates = {name: n / n_worlds for name, n in rejected.items()}
    # 5 %, and two standard errors of 300 worlds
    assert max(rates.values()) <= 0.05 + 0.025, rates
    assert np.mean(list(rates.values())) <= 0.06, rates


@pytest.mark.parametrize("units", [2, 5, 8, 12, 20])
def test_no_p_value_is_smaller_than_the_units_support(units: int) -> None:
    a = SequenceLosses(np.full(units, 3.0) + 0.001 * np.arange(units), np.ones(units, np.int64))
    b = SequenceLosses(np.full(units, 2.0), np.ones(units, np.int64))
    found = significance.paired_sequences(a, b)
    assert found.p_sign == pytest.approx(2.0 ** (1 - units))
    assert found.p_wilcoxon >= 2.0 ** (1 - units)
    p = significance.paired_ratio(STATISTICS["corpus_ppl"], a, b).p
    assert p is None or p >= 2.0 ** (1 - units) * (1 - 1e-9)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_sign_test_equals_all_flips_of_the_units(totals: list[int]) -> None:
    signs = itertools.product((1, -1), repeat=len(totals))
    sums = [abs(sum(s * t for s, t in zip(row, totals, strict=True))) for row in signs]
    expected = np.mean([s >= abs(sum(totals)) for s in sums])
    assert significance.sign_p(np.array(totals, dtype=float)) == pytest.approx(expected)


def test_the_sign_test_of_single_sequences_is_the_binomial_test() -> None:
    signs = np.array([1.0] * 90 + [-1.0] * 38)
    expected = stats.binomtest(90, 128).pvalue
    assert significance.sign_p(signs) == pytest.approx(expected, rel=1e-9)


def test_articles_widen_the_interval_as_their_sequences_repeat_each_other() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(20), 6)
    n_tokens = np.full(120, 2047)
    nll = 2.2 + rng.normal(0, 0.4, 20)[group] + rng.normal(0, 0.05, 120)
    grouped = SequenceLosses(nll * n_tokens, n_tokens, group)
    alone = SequenceLosses(nll * n_tokens, n_tokens)
    wide = intervals.estimate(STATISTICS["corpus_ppl"], grouped)
    narrow = intervals.estimate(STATISTICS["corpus_ppl"], alone)
    # six equal members per article carry the information of one: √6 ≈ 2.4 times as wide
    assert 1.9 < width(wide) / width(narrow) < 2.9


def test_resampling_draws_articles_whole() -> None:
    sample = random_losses(5, n=12)
    grouped = SequenceLosses(sample.nll_sum, sample.n_tokens, np.repeat(np.arange(4), 3))
    counts = intervals.resample(grouped, np.random.default_rng(1), 50)
    assert (counts[:, ::3] == counts[:, 1::3]).all()
    assert (counts.sum(1) == 12).all()


def test_all_of_128_sequences_of_8_articles_are_no_proof_of_all_sequences() -> None:
    group = np.repeat(np.arange(8), 16)
    sample = SequenceLosses(np.full(128, 5.0), np.ones(128, np.int64), group)
    found = intervals.share_estimate(np.ones(128), sample)
    low, high = interval(found)
    assert (found.value, high) == (1.0, 1.0)
    assert 0.45 < low < 0.65  # 0.025^(1/8) = 0.63, and less for the t of 8 units


def same_top(n_same: list[int], n_tokens: int) -> SequenceDivergences:
    n = len(n_same)
    zeros = np.zeros(n)
    return SequenceDivergences(
        np.full(n, n_tokens), zeros, np.array(n_same), zeros, zeros, np.arange(n)
    )


@given(st.lists(st.integers(0, 63), min_size=8, max_size=20))
@settings(max_examples=60, deadline=None)
def test_an_interval_of_a_share_lies_within_0_and_100_percent_and_has_a_width(
    n_same: list[int],
) -> None:
    found = intervals.estimate(DIVERGENCES["same_top_p"], same_top(n_same, 63))
    low, high = interval(found)
    assert 0 <= low <= found.value <= high <= 100
    assert high - low > 0.1


def test_shares_of_one_unit_each_have_clopper_and_pearsons_interval() -> None:
    n_same = [1] * 90 + [0] * 10
    found = intervals.estimate(DIVERGENCES["same_top_p"], same_top(n_same, 1))
    theirs = stats.binomtest(90, 100).proportion_ci(0.95, "exact")
    assert interval(found) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=0.2)


@pytest.mark.parametrize(
    ("units", "n_tokens", "share", "icc"),
    [(8, 255, 0.99, 0.002), (12, 63, 0.9, 0.01), (55, 511, 0.999, 0.002), (12, 255, 0.9999, 0.01)],
)
def test_intervals_of_same_top_cover_the_truth_93_percent_of_the_time(
    units: int, n_tokens: int, share: float, icc: float
) -> None:
    rng = np.random.default_rng(31)
    hits, n_worlds = 0, 300
    for _ in range(n_worlds):
        p = rng.beta(share * (1 / icc - 1), (1 - share) * (1 / icc - 1), units)
        sample = same_top(rng.binomial(n_tokens, p).tolist(), n_tokens)
        low, high = interval(intervals.estimate(DIVERGENCES["same_top_p"], sample))
        hits += low <= 100 * share <= high
    assert hits / n_worlds >= 0.93 - 0.03


def test_an_interval_of_what_is_not_negative_stops_at_0() -> None:
    kld = np.array([0.5, *np.zeros(9)])
    zeros = np.zeros(10)
    sample = SequenceDivergences(np.full(10, 100), kld, np.full(10, 99), zeros, zeros)
    found = intervals.estimate(DIVERGENCES["mean_kld"], sample)
    low, high = interval(found)
    assert low == 0 < found.value < high


def test_no_interval_is_claimed_for_p99_or_the_maximum_of_128() -> None:
    losses = random_losses(1)
    claimed = {k for k, s in STATISTICS.items() if intervals.estimate(s, losses).has_interval}
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


def test_a_paired_ratio_is_far_sharper_than_two_intervals() -> None:
    a = random_losses(2)
    rng = np.random.default_rng(3)
    noise = rng.normal(0.01, 0.02, 128) * a.n_tokens
    b = SequenceLosses(a.nll_sum + noise, a.n_tokens)
    statistic = STATISTICS["corpus_ppl"]
    paired = significance.paired_ratio(statistic, b, a)
    alone = intervals.estimate(statistic, a)
    assert paired.value == pytest.approx(statistic.of(b) / statistic.of(a), rel=1e-12)
    low, high = interval(paired)
    assert 1 < low < paired.value < high
    assert width(paired) < 0.1 * width(alone) / alone.value
    assert paired.p is not None
    assert paired.p < 0.001
    back = paired.inverse()
    assert interval(back) == pytest.approx((1 / high, 1 / low))
    assert significance.paired_ratio(statistic, a, b).value == pytest.approx(back.value)


def test_identical_models_differ_by_exactly_nothing() -> None:
    a = random_losses(4)
    for statistic in STATISTICS.values():
        found = significance.paired_ratio(statistic, a, a)
        assert found.value == 1
        assert found.p in (None, 1.0)
    same = significance.paired_sequences(a, a)
    assert (same.n_better, same.n_worse, same.share.value) == (0, 0, 0.5)
    assert (same.p_sign, same.p_wilcoxon) == (1.0, 1.0)


def test_wilcoxon_ranks_articles_not_their_sequences() -> None:
    a, b = random_losses(5, n=60), random_losses(5, n=60, spread=0.41)
    delta = significance.delta_nll(a, b)
    assert delta == pytest.approx(a.nll_sum / a.n_tokens - b.nll_sum / b.n_tokens)
    assert significance.wilcoxon_p(a, b) == pytest.approx(stats.wilcoxon(delta).pvalue)
    group = np.repeat(np.arange(20), 3)
    x, y = (SequenceLosses(s.nll_sum, s.n_tokens, group) for s in (a, b))
    sums = (a.nll_sum - b.nll_sum).reshape(20, 3).sum(1) / a.n_tokens.reshape(20, 3).sum(1)
    assert significance.wilcoxon_p(x, y) == pytest.approx(stats.wilcoxon(sums).pvalue)


def test_holm_follows_the_textbook_example() -> None:
    found = significance.holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert found == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=20))
def test_holm_lies_between_the_raw_and_the_bonferroni_values(p: list[float]) -> None:
    raw = np.array(p)
    adjusted = significance.holm(raw)
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
        significance.delta_nll(random_losses(1), random_losses(2))
    with pytest.raises(ResultError, match="same sequences"):
        significance.delta_nll(random_losses(1), random_losses(1, n=5))


def test_intervals_of_divergences_depend_on_nothing_but_the_sample() -> None:
    sample = random_divergences(1)
    for statistic in DIVERGENCES.values():
        if not statistic.is_known(sample):
            assert statistic is DIVERGENCES["late_kld"]
            continue
        first, second = (intervals.estimate(statistic, sample) for _ in range(2))
        assert first == second
        low, high = interval(first)
        assert low < first.value < high
