"""Leaderboards: published figures, and results whose rankings disagree for known reasons."""

import numpy as np
import pytest

import published
from made_results import eval_result, ordinary_ppl, wild_ppl
from ramgguf.core.errors import ResultError
from ramgguf.evaluate.comparison import compare_published, compare_results
from ramgguf.evaluate.leaderboard import Aggregate, Leaderboard, Reversal, Verdict
from ramgguf.evaluate.result import BrokenSequence, EvalResult
from ramgguf.evaluate.statistics import STATISTICS
from ramgguf.evaluate.summary import losses, summarize, unique_labels
from ramgguf.report.sentences import findings


def rng() -> np.random.Generator:
    return np.random.default_rng(42)


def board_of(*results: EvalResult, n_resamples: int = 2000) -> Leaderboard:
    return compare_results(results, rng(), n_resamples=n_resamples)


# --- published figures ---


def test_glm_4_7_flash_is_a_full_inversion() -> None:
    board = compare_published(published.GLM_4_7_FLASH)
    (only,) = board.disagreements
    assert only.full_inversion
    assert only.first.order == ("RAM", "RAM v1", "BF16")
    assert only.second.order == ("BF16", "RAM v1", "RAM")
    assert len(only.reversals) == 3
    assert {r.verdict for r in only.reversals} == {Verdict.UNKNOWN}
    first, gap = findings(board)
    assert first.startswith("Full inversion: corpus PPL ranks RAM < RAM v1 < BF16")
    assert "significant is unknown" in first
    assert "2.64 (BF16" in gap


def test_qwen3_flips_16_gb_against_v1_only() -> None:
    board = compare_published(published.QWEN3_30B_A3B)
    (only,) = board.disagreements
    (flip,) = only.reversals
    assert (flip.better, flip.worse) == ("v1", "16 GB")
    assert not only.full_inversion
    assert findings(board)[0] == (
        "Corpus PPL puts v1 before 16 GB, median PPL puts 16 GB before v1. Whether that is"
        " significant is unknown: aggregates carry no per-sequence losses."
    )


def test_llama_4_scout_is_not_inverted_but_parted_by_up_to_0_37() -> None:
    board = compare_published(published.LLAMA_4_SCOUT)
    assert board.disagreements == ()
    assert board.gap is not None
    assert board.gap.label == "64 GB"
    assert board.gap.value == pytest.approx(-0.367)
    assert findings(board) == (
        "No inversion: corpus PPL and median PPL rank the models alike.",
        "Corpus and median PPL of one model part by up to 0.37 (64 GB: 7.703 against 8.070).",
    )


def test_ram_beats_gptq_at_matched_size_by_both() -> None:
    board = compare_published(published.QWEN2_57B_A14B)
    assert board.disagreements == ()
    assert {r.order for r in board.rankings} == {("RAM", "GPTQ")}


def test_two_published_rows_of_one_name_are_refused() -> None:
    with pytest.raises(ResultError, match="two rows are called 'a'"):
        compare_published([Aggregate("a", corpus_ppl=1), Aggregate("a", corpus_ppl=2)])


def test_models_are_compared_only_by_what_is_known_of_both() -> None:
    board = compare_published(
        [
            Aggregate("a", corpus_ppl=1.0, median_ppl=3.0),
            Aggregate("b", corpus_ppl=2.0),
            Aggregate("c", median_ppl=1.0),
        ]
    )
    assert board.disagreements == ()
    assert [r.order for r in board.rankings] == [("a", "b"), ("c", "a")]


# --- which "mean" gives which number ---


@pytest.mark.parametrize(
    ("n", "corpus", "mean"), [(128, (11.5, 12.3), (1900, 2000)), (256, (10.0, 10.8), (950, 1010))]
)
def test_the_published_mean_is_exp_of_the_mean_nll_not_the_average_of_ppl(
    n: int, corpus: tuple[float, float], mean: tuple[float, float]
) -> None:
    """GLM-4.7-Flash at BF16: median 8.706, "mean" 11.344, five sequences of 25,000 to 81,000.

    Only the token-weighted definition comes near 11.344; the average of sequence PPL is two
    orders of magnitude larger, and the median does not move.
    """
    sample = losses(eval_result("BF16", wild_ppl(n=n, median=8.706)))
    assert corpus[0] < STATISTICS["corpus_ppl"].of(sample) < corpus[1]
    assert mean[0] < STATISTICS["mean_ppl"].of(sample) < mean[1]
    assert STATISTICS["geometric_mean_ppl"].of(sample) == pytest.approx(
        STATISTICS["corpus_ppl"].of(sample)
    )
    assert STATISTICS["median_ppl"].of(sample) == pytest.approx(8.706, rel=1e-4)


# --- disagreements with a known cause ---


def inversion() -> tuple[EvalResult, EvalResult, EvalResult]:
    """Return three models like GLM-4.7-Flash's: the better the median, the wilder the tail."""
    base = ordinary_ppl(1, median=8.706)
    wild = np.argsort(base)[-5:]
    noise = np.random.default_rng(2).normal(0, 0.003, (3, 128))
    bf16, v1, ram = (base * s * np.exp(e) for s, e in zip((1, 1.04, 1.06), noise, strict=True))
    bf16[wild] = (25_000, 33_000, 47_000, 62_000, 81_000)
    v1[wild] = (600, 800, 1000, 1200, 90)
    return eval_result("BF16", bf16), eval_result("v1", v1), eval_result("RAM", ram)


def test_a_full_inversion_names_its_sequences_and_what_remains_without_them() -> None:
    board = compare_results(inversion(), rng(), n_resamples=4000)
    wild = {int(i) for i in np.argsort(ordinary_ppl(1))[-5:]}
    by_median = next(
        d
        for d in board.disagreements
        if (d.first.criterion, d.second.criterion) == ("corpus_ppl", "median_ppl")
    )
    assert by_median.full_inversion
    assert {c.sequence.index for c in by_median.culprits} == wild
    assert by_median.without is not None
    assert {r.order for r in by_median.without} == {("BF16", "v1", "RAM")}
    text = findings(board)[0]
    assert "Without them both rank BF16 < v1 < RAM." in text
    assert "5 sequences cause it" in text
    assert "PPL 81,000 under BF16" in text
    again = findings(board)[1]
    assert again.startswith("Full inversion: mean PPL ranks RAM < v1 < BF16")
    assert "is unknown: a tail this heavy leaves mean PPL without a variance" in again
    assert "The same sequences cause it. Without them both rank BF16 < v1 < RAM." in again


def test_a_disagreement_backed_by_many_sequences_is_significant() -> None:
    base = ordinary_ppl(3, n=200)
    order = np.argsort(base)
    a, b = base.copy(), base * 1.02
    a[order[-60:]] *= 1.5  # better on most sequences, clearly worse on the hardest third
    board = board_of(eval_result("a", a), eval_result("b", b))
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    (pair,) = found.reversals
    assert pair.verdict is Verdict.SIGNIFICANT
    assert pair.difference_first is not None
    assert pair.difference_first.high is not None
    assert pair.difference_first.high < 0
    assert found.culprits == ()  # sixty sequences are the text, not an exception
    assert "That is significant: each criterion on its own" in findings(board)[0]


def test_a_flip_by_one_sequence_is_noise_and_names_it() -> None:
    base = ordinary_ppl(5)
    b = base * np.exp(np.random.default_rng(6).normal(0, 0.002, 128) + 0.01)
    a = base.copy()
    a[17] = 900.0
    titles = [f"Article {i // 4}" for i in range(128)]
    board = board_of(eval_result("a", a, titles=titles), eval_result("b", b, titles=titles))
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    assert [c.sequence.index for c in found.culprits] == [17]
    assert found.reversals[0].verdict is Verdict.NOISE
    text = findings(board)[0]
    assert "That is noise: neither corpus PPL (Holm-corrected p = " in text
    assert "One sequence causes it: #17 (Article 4), PPL 900.0 under a" in text
    assert text.endswith("Without it both rank a < b.")


def test_equally_good_models_disagree_significantly_in_fewer_than_5_percent_of_worlds() -> None:
    source = np.random.default_rng(7)
    n_disagreeing, n_significant = 0, 0
    for _ in range(60):
        base = source.normal(2.2, 0.3, 128)
        models = [eval_result(name, np.exp(base + source.normal(0, 0.02, 128))) for name in "abcd"]
        board = compare_results(models, source, n_resamples=2400)
        verdicts = [r.verdict for d in board.disagreements for r in d.reversals]
        n_disagreeing += bool(verdicts)
        n_significant += Verdict.SIGNIFICANT in verdicts
    assert n_disagreeing > 30  # noise does make rankings differ …
    assert n_significant <= 3  # … and is seen as noise


def test_p_values_are_corrected_for_the_number_of_pairs() -> None:
    base = ordinary_ppl(9)
    noise = np.random.default_rng(10).normal(0, 0.03, (6, 128))
    many = [eval_result(f"m{i}", base * np.exp(e)) for i, e in enumerate(noise)]
    raw = {r.better + r.worse: _p(r) for r in _reversals(board_of(*many[:2], n_resamples=6000))}
    corrected = {r.better + r.worse: _p(r) for r in _reversals(board_of(*many, n_resamples=6000))}
    shared = raw.keys() & corrected.keys()
    assert all(corrected[k] >= raw[k] for k in shared)
    assert len(corrected) > len(raw)


def _reversals(board: Leaderboard) -> list[Reversal]:
    return [r for d in board.disagreements for r in d.reversals]


def _p(reversal: Reversal) -> float:
    assert reversal.difference_first is not None
    assert reversal.difference_first.p is not None
    return reversal.difference_first.p


def test_neighbours_that_a_criterion_does_not_tell_apart_are_named() -> None:
    base = ordinary_ppl(21)
    noise = np.random.default_rng(22).normal(0, 0.02, (2, 128))
    near, twin = (base * np.exp(e) for e in noise)
    board = board_of(
        eval_result("near", near), eval_result("twin", twin), eval_result("far", base * 1.2)
    )
    tied = {(t.criterion, frozenset((t.better, t.worse))) for t in board.ties}
    assert ("corpus_ppl", frozenset(("near", "twin"))) in tied
    assert not any("far" in pair for _, pair in tied)
    said = [f for f in findings(board) if f.startswith("Corpus PPL does not tell apart")]
    assert len(said) == 1
    assert "(Holm-corrected p = " in said[0]


def test_kld_is_a_criterion_where_the_reference_is_shared() -> None:
    base = ordinary_ppl(11)
    near, far = np.full(128, 0.01), np.full(128, 0.05)
    reference = ("BF16", base)
    lucky = eval_result("lucky", base * 0.99, reference=reference, kld=far)
    honest = eval_result("honest", base * 1.01, reference=reference, kld=near)
    board = board_of(eval_result("BF16", base), lucky, honest)
    assert next(r for r in board.rankings if r.criterion == "mean_kld").order == ("honest", "lucky")
    against = [d for d in board.disagreements if d.second.criterion == "mean_kld"]
    assert {d.first.criterion for d in against} == {"corpus_ppl", "mean_ppl", "median_ppl"}
    assert all(d.reversals[0].verdict is Verdict.SIGNIFICANT for d in against)


def test_kld_to_different_references_is_not_ranked() -> None:
    base = ordinary_ppl(11)
    kld = np.full(128, 0.01)
    board = board_of(
        eval_result("a", base, reference=("BF16", base), kld=kld),
        eval_result("b", base * 1.01, reference=("F16", base), kld=kld),
    )
    assert "mean_kld" not in [r.criterion for r in board.rankings]
    assert any("2 different references" in f for f in findings(board))


def test_the_order_of_the_results_does_not_matter() -> None:
    results = inversion()
    one, other = (compare_results(r, rng(), n_resamples=500) for r in (results, results[::-1]))
    assert [r.label for r in one.rows] == [r.label for r in other.rows]
    assert one.rankings == other.rankings
    assert [d.first for d in one.disagreements] == [d.first for d in other.disagreements]
    assert [[c.sequence.index for c in d.culprits] for d in one.disagreements] == [
        [c.sequence.index for c in d.culprits] for d in other.disagreements
    ]


# --- what may not be compared ---


@pytest.mark.parametrize(
    ("part", "update", "message"),
    [
        (None, {"tokenizer_sha256": "other"}, "tokenizer: "),
        (None, {"token_ids_sha256": "other"}, "token ids: "),
        ("text", {"sha256": "other"}, "text: "),
        ("protocol", {"n_ctx": 513}, "protocol: "),
        ("protocol", {"seed": 1}, "protocol: .*seed 42.*seed 1"),
        ("protocol", {"bos": True}, "protocol: .*no BOS.* BOS"),
        ("engine", {"llama_cpp_build": "b2"}, "llama.cpp build: b1 .*b2"),
        ("engine", {"safe_kernels": True}, "safe kernels: False .*True"),
    ],
)
def test_results_measured_differently_are_not_ranked(
    part: str | None, update: dict[str, object], message: str
) -> None:
    a, b = eval_result("a", ordinary_ppl()), eval_result("b", ordinary_ppl())
    if part is not None:
        update = {part: getattr(b, part).model_copy(update=update)}
    with pytest.raises(ResultError, match=f"may not be ranked together.*{message}"):
        board_of(a, b.model_copy(update=update))


def test_a_crashed_model_leaves_the_others_whole() -> None:
    a, b = eval_result("a", ordinary_ppl(1)), eval_result("b", ordinary_ppl(2))
    failure = "llama.cpp died of SIGSEGV"
    crashed = eval_result("c", ordinary_ppl(3)[:3]).model_copy(update={"failure": failure})
    board = board_of(a, b, crashed.model_copy(update={"protocol": a.protocol}))
    assert board.n_sequences == 128
    assert {r.label for r in board.rows} == {"a", "b"}
    assert f"c finished 3 of 128 sequences and is not ranked: {failure}." in findings(board)


def test_models_are_ranked_on_the_sequences_that_all_finished() -> None:
    values = ordinary_ppl(1)
    a = eval_result("a", values, n_seq=128)
    b = eval_result("b", values[4:], indices=range(4, 128), n_seq=128)
    broken = tuple(BrokenSequence(index=i, n_broken=9, first_broken=2) for i in range(4))
    board = board_of(
        a,
        b.model_copy(
            update={"broken": broken, "token_ids_sha256": "tokens", "protocol": a.protocol}
        ),
    )
    assert board.n_sequences == 124
    assert len({r.estimates["corpus_ppl"].value for r in board.rows}) == 1
    assert any("NaN" in f and "4 sequences" in f for f in findings(board))


def test_too_few_sequences_leave_significance_unknown() -> None:
    a, b = eval_result("a", [1.0, 2.0, 9.0]), eval_result("b", [1.1, 2.1, 3.0])
    board = board_of(a, b)
    (pair,) = board.disagreements[0].reversals
    assert pair.verdict is Verdict.UNKNOWN
    assert "too few sequences to tell" in findings(board)[0]


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ResultError, match="at least one result"):
        compare_results([], rng())
    empty = eval_result("a", [1.0]).model_copy(update={"sequences": ()})
    with pytest.raises(ResultError, match="no result has a finished sequence"):
        compare_results([empty], rng())
    with pytest.raises(ResultError, match=r"a\.gguf: no scored sequence"):
        summarize(empty, rng())


def test_one_result_is_a_leaderboard_without_findings_about_ranks() -> None:
    board = board_of(eval_result("a", ordinary_ppl()))
    assert board.disagreements == ()
    assert [r.order for r in board.rankings] == [("a",)] * 3
    assert not any("inversion" in f for f in findings(board))


# --- summaries ---


def test_a_summary_against_its_reference_uses_paired_statistics() -> None:
    base = ordinary_ppl(1)
    change = np.random.default_rng(3).normal(0.02, 0.01, 128)
    kld = np.random.default_rng(4).gamma(2, 0.01, 128)
    result = eval_result("q4", base * np.exp(change), reference=("f16", base), kld=kld)
    found = summarize(result, rng(), n_resamples=2000)
    against = found.against
    assert against is not None
    assert against.label == "f16"
    assert against.delta_nll == pytest.approx(change)
    assert against.ppl_ratio.value == pytest.approx(np.exp(change.mean()))
    assert against.ppl_ratio.low is not None
    assert against.ppl_ratio.high is not None
    assert 1.01 < against.ppl_ratio.low < against.ppl_ratio.value < against.ppl_ratio.high < 1.03
    assert against.wilcoxon_p < 1e-6
    assert against.delta_corpus_ppl.p is not None
    assert against.delta_corpus_ppl.p < 0.01
    assert against.divergences["mean_kld"].value == pytest.approx(kld.mean())
    assert against.quantiles is not None
    assert against.quantiles.p99 == pytest.approx(np.quantile(kld, 0.99))


def test_a_summary_without_reference_has_nothing_to_pair() -> None:
    found = summarize(eval_result("a", wild_ppl()), rng(), n_resamples=500)
    assert found.against is None
    assert found.tail.verdict == "heavy-tailed"
    assert [round(s.ppl) for s in found.outliers] == [81_000, 62_000, 47_000, 33_000, 25_000]


def test_files_of_one_name_are_told_apart_by_their_folders() -> None:
    a = eval_result("a", [1.0])
    paths = ("x/one/m.gguf", "x/two/m.gguf", "x/n.gguf", "x/n.gguf")
    results = [
        a.model_copy(update={"model": a.model.model_copy(update={"path": p})}) for p in paths
    ]
    assert unique_labels(results) == ("one/m", "two/m", "x/n (1)", "x/n (2)")
