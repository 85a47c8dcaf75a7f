"""Leaderboards: published figures, and results whose rankings disagree for known reasons."""

import numpy as np
import pytest

import published
from made_results import eval_result, ordinary_ppl, wild_ppl
from ramgguf.core.errors import ResultError
from ramgguf.evaluate.comparison import compare_published, compare_results
from ramgguf.evaluate.eval_report import eval_report
from ramgguf.evaluate.leaderboard import Aggregate, Leaderboard, Reversal, Verdict, ranking
from ramgguf.evaluate.recommendation import Recommendation, carried_criteria, recommend
from ramgguf.evaluate.result import BrokenSequence, EvalResult
from ramgguf.evaluate.statistics import STATISTICS
from ramgguf.evaluate.summary import losses, summarize, unique_labels
from ramgguf.report.sentences import findings, order


def rng() -> np.random.Generator:
    return np.random.default_rng(42)


def board_of(*results: EvalResult, n_resamples: int = 2000) -> Leaderboard:
    return compare_results(results, rng(), n_resamples=n_resamples)


def recommended(board: Leaderboard) -> Recommendation:
    found = recommend(board)
    assert found is not None
    return found


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
    assert first.startswith(
        "Full inversion: corpus PPL ranks RAM < RAM v1 < BF16; median PPL ranks"
    )
    assert "significant is unknown" in first
    assert "2.64 (BF16" in gap


def test_qwen3_flips_16_gb_against_v1_only() -> None:
    board = compare_published(published.QWEN3_30B_A3B)
    (only,) = board.disagreements
    (flip,) = only.reversals
    assert (flip.better, flip.worse) == ("v1", "16 GB")
    assert not only.full_inversion
    assert findings(board)[0] == (
        "Inversion: corpus PPL ranks 19 GB < v1 < 16 GB; median PPL ranks 19 GB < 16 GB < v1."
        " Whether that is significant is unknown: aggregates carry no per-sequence losses."
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
    assert {s.sequence.index for s in by_median.influential} == wild
    assert by_median.without is not None
    assert {r.order for r in by_median.without} == {("BF16", "v1", "RAM")}
    text = findings(board)[0]
    assert text.startswith("Full inversion: corpus PPL and mean PPL rank RAM < v1 < BF16; median")
    assert "Without them all rank BF16 < v1 < RAM." in text
    assert text.count("5 sequences cause it") == 1
    assert "PPL 81,000 under BF16" in text
    assert sum("nversion" in f for f in findings(board)) == 1


def test_a_disagreement_backed_by_many_sequences_is_significant() -> None:
    base = ordinary_ppl(3, n=200)
    order = np.argsort(base)
    a, b = base.copy(), base * 1.02
    a[order[-60:]] *= 1.5  # better on most sequences, clearly worse on the hardest third
    board = board_of(eval_result("a", a), eval_result("b", b))
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    (pair,) = found.reversals
    assert pair.verdict is Verdict.SIGNIFICANT
    assert pair.ratio_first is not None
    assert pair.ratio_first.low is not None
    assert pair.ratio_first.low > 1 or (pair.ratio_first.high or 2) < 1
    assert found.influential == ()  # sixty sequences are the text, not an exception
    assert "Significant: each criterion tells the two apart" in findings(board)[0]


def test_a_flip_by_one_sequence_of_128_is_a_headline_and_names_it() -> None:
    base = ordinary_ppl(5)
    b = base * np.exp(np.random.default_rng(6).normal(0, 0.002, 128) + 0.01)
    a = base.copy()
    a[17] = 900.0
    titles = [f"Article {i // 4}" for i in range(128)]
    board = board_of(eval_result("a", a, titles=titles), eval_result("b", b, titles=titles))
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    assert [s.sequence.index for s in found.influential] == [17]
    assert found.reversals[0].verdict is Verdict.FEW
    text = findings(board)[0]
    assert "a is better than b on 127 of 128 sequences (sign test p = " in text
    assert "few sequences outweigh the rest" in text
    assert "noise" not in text
    assert "One sequence causes it: #17 (Article 4), PPL 900.0 under a" in text
    assert text.endswith("Without it all rank a < b.")
    assert recommended(board).take == "a"
    assert carried_criteria(board) == ("corpus_ppl", "mean_ppl")


def test_equally_good_models_disagree_significantly_in_fewer_than_5_percent_of_worlds() -> None:
    source = np.random.default_rng(7)
    n_disagreeing, n_significant = 0, 0
    for _ in range(60):
        base = source.normal(2.2, 0.3, 128)
        models = [eval_result(name, np.exp(base + source.normal(0, 0.02, 128))) for name in "abcd"]
        board = compare_results(models, source, n_resamples=400)
        verdicts = [r.verdict for d in board.disagreements for r in d.reversals]
        n_disagreeing += bool(verdicts)
        n_significant += bool({Verdict.SIGNIFICANT, Verdict.FEW} & set(verdicts))
    assert n_disagreeing > 30  # chance does make rankings differ …
    assert n_significant <= 4  # … and is left unresolved


def test_p_values_are_corrected_for_the_number_of_pairs() -> None:
    base = ordinary_ppl(9)
    noise = np.random.default_rng(10).normal(0, 0.03, (6, 128))
    many = [eval_result(f"m{i}", base * np.exp(e)) for i, e in enumerate(noise)]
    raw = {r.better + r.worse: _p(r) for r in _reversals(board_of(*many[:2], n_resamples=600))}
    corrected = {r.better + r.worse: _p(r) for r in _reversals(board_of(*many, n_resamples=600))}
    shared = raw.keys() & corrected.keys()
    assert all(corrected[k] >= raw[k] for k in shared)
    assert len(corrected) > len(raw)


def _reversals(board: Leaderboard) -> list[Reversal]:
    return [r for d in board.disagreements for r in d.reversals]


def _p(reversal: Reversal) -> float:
    assert reversal.ratio_first is not None
    assert reversal.ratio_first.p is not None
    return reversal.ratio_first.p


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
    said = [f for f in findings(board) if f.startswith("Unresolved (Holm-corrected): ")]
    assert len(said) == 1
    assert "corpus PPL (p = " in said[0]


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
    assert "BF16" not in next(r for r in board.rankings if r.criterion == "mean_kld").order


def test_kld_to_different_references_is_not_ranked() -> None:
    base = ordinary_ppl(11)
    kld = np.full(128, 0.01)
    board = board_of(
        eval_result("a", base, reference=("BF16", base), kld=kld),
        eval_result("b", base * 1.01, reference=("F16", base), kld=kld),
    )
    assert {r.label for r in board.rows} == {"a", "b", "BF16", "F16"}
    assert "mean_kld" not in [r.criterion for r in board.rankings]
    assert any("2 different references" in f for f in findings(board))


def test_the_order_of_the_results_does_not_matter() -> None:
    results = inversion()
    one, other = (compare_results(r, rng(), n_resamples=500) for r in (results, results[::-1]))
    assert [r.label for r in one.rows] == [r.label for r in other.rows]
    assert one.rankings == other.rankings
    assert [d.first for d in one.disagreements] == [d.first for d in other.disagreements]
    assert [[s.sequence.index for s in d.influential] for d in one.disagreements] == [
        [s.sequence.index for s in d.influential] for d in other.disagreements
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
    assert any(
        f.startswith("b gave NaN or infinite logits in 4 sequences") for f in findings(board)
    )


def test_a_references_broken_sequences_are_said_of_it_once() -> None:
    values = ordinary_ppl(1)
    broken = tuple(
        BrokenSequence(index=i, n_broken=9, first_broken=2, in_model=False, in_reference=True)
        for i in range(4)
    )
    found = [
        eval_result(
            label,
            values[4:],
            indices=range(4, 128),
            n_seq=128,
            reference=("base", values[4:]),
            kld=np.full(124, 0.1),
        ).model_copy(update={"broken": broken})
        for label in ("a", "b")
    ]
    said = [f for f in findings(board_of(*found)) if "NaN" in f]
    assert len(said) == 1
    assert said[0].startswith("base gave NaN or infinite logits in 4 sequences")


def test_broken_sequences_say_why_a_model_is_not_ranked() -> None:
    a, b = eval_result("a", ordinary_ppl(1)), eval_result("b", ordinary_ppl(2)[:3], n_seq=128)
    broken = tuple(BrokenSequence(index=i, n_broken=9, first_broken=2) for i in range(3, 128))
    update = {"broken": broken, "protocol": a.protocol}
    said = findings(
        board_of(a, a.model_copy(update={"model": b.model}), b.model_copy(update=update))
    )
    assert any("not ranked: b gave NaN or infinite logits in 125 sequences" in f for f in said)


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
        summarize(empty)


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
    found = summarize(result)
    against = found.against
    assert against is not None
    assert against.label == "f16"
    assert against.delta_nll == pytest.approx(change)
    assert against.ppl_ratio.value == pytest.approx(np.exp(change.mean()))
    assert against.ppl_ratio.low is not None
    assert against.ppl_ratio.high is not None
    assert 1.01 < against.ppl_ratio.low < against.ppl_ratio.value < against.ppl_ratio.high < 1.03
    assert against.sequences.p_wilcoxon < 1e-6
    assert against.sequences.n_worse == np.count_nonzero(change > 0)
    assert against.sequences.median_delta.value == pytest.approx(np.median(change))
    assert against.ppl_ratio.p is not None
    assert against.ppl_ratio.p < 0.01
    assert against.divergences["mean_kld"].value == pytest.approx(kld.mean())
    assert against.quantiles is not None
    assert against.quantiles.p99 == pytest.approx(np.quantile(kld, 0.99))


def test_a_summary_without_reference_has_nothing_to_pair() -> None:
    found = summarize(eval_result("a", wild_ppl()))
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


# --- the reference, the common sequences, the headline cases ---


def against_bf16() -> tuple[EvalResult, EvalResult]:
    """Return two models scored against BF16, which fails on five sequences and leads by median."""
    bf16, v1, ram = inversion()
    reference = ("BF16", [s.ppl for s in bf16.sequences])
    kld = np.random.default_rng(1).gamma(4, 0.01, 128)
    return (
        eval_result("v1", [s.ppl for s in v1.sequences], reference=reference, kld=kld),
        eval_result("RAM", [s.ppl for s in ram.sequences], reference=reference, kld=kld * 1.4),
    )


def test_the_reference_is_a_row_and_its_inversion_is_found_from_stored_losses() -> None:
    board = board_of(*against_bf16())
    assert [r.label for r in board.rows] == ["BF16", "v1", "RAM"]
    assert board.rows[0].is_reference
    assert board.rows[0].n_outliers == 5
    assert {r.criterion: r.order for r in board.rankings} == {
        "corpus_ppl": ("RAM", "v1", "BF16"),
        "mean_ppl": ("RAM", "v1", "BF16"),
        "median_ppl": ("BF16", "v1", "RAM"),
        "mean_kld": ("v1", "RAM"),
    }
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    pair = next(r for r in found.reversals if {r.better, r.worse} == {"RAM", "BF16"})
    assert pair.verdict is Verdict.FEW
    assert pair.sequences is not None
    assert pair.sequences.n_worse == 123
    assert pair.sequences.p_wilcoxon < 1e-6
    text = findings(board)[0]
    assert "BF16 is better than RAM on 123 of 128 sequences" in text
    assert "5 sequences cause it" in text
    assert recommended(board).take == "v1"


def test_a_reference_among_the_models_is_one_row_and_has_no_kld() -> None:
    v1, ram = against_bf16()
    base = np.exp([(s.reference_nll_sum or 0.0) / s.n_scored for s in v1.sequences])
    bf16 = eval_result("BF16", base, reference=("BF16", base), kld=np.zeros(128))
    board = board_of(bf16, v1, ram)
    assert [r.label for r in board.rows] == ["BF16", "v1", "RAM"]
    assert "mean_kld" not in board.rows[0].estimates


def test_few_sequences_that_make_a_worse_model_look_better_are_a_headline() -> None:
    base = ordinary_ppl(5)
    a, b = base * 1.01, base.copy()
    b[[3, 9]] = 5_000.0  # b is better on the 126 others
    board = board_of(eval_result("a", a), eval_result("b", b))
    found = next(d for d in board.disagreements if d.second.criterion == "median_ppl")
    assert found.reversals[0].verdict is Verdict.FEW
    assert "b is better than a on 126 of 128 sequences" in findings(board)[0]
    assert recommended(board).take == "b"
    assert recommended(board).agree is False


def test_influential_sequences_are_named_by_the_pair_that_they_decide() -> None:
    base = ordinary_ppl(5)
    a, b, c = base * 1.01, base.copy(), base * 3
    b[5], c[5] = 386.0, 7_764.0
    board = board_of(eval_result("a", a), eval_result("b", b), eval_result("c", c))
    text = findings(board)[0]
    assert f"#5, PPL 386.0 under b, {a[5]:.3f} under a" in text
    assert "under c" not in text


def test_every_table_ranking_and_test_uses_the_common_sequences() -> None:
    values = ordinary_ppl(1, n=64)
    values[:4] = 80.0
    a = eval_result("a", values)
    b = eval_result("b", values[4:] * 1.02, indices=range(4, 64), n_seq=64)
    b = b.model_copy(update={"protocol": a.protocol})
    made = eval_report([a, b])
    assert made.board is not None
    for summary, row in zip(made.summaries, made.board.rows, strict=True):
        assert summary.label == row.label
        assert len(summary.result.sequences) == 60
        assert summary.estimates["corpus_ppl"] == row.estimates["corpus_ppl"]
    assert any("60 sequences that all finished, of 64" in n for n in made.board.notes)
    assert made.partial == (made.board.partial)
    assert "b is partial: 60 of 64 sequences" in made.partial[0]


def test_runs_stopped_early_are_partial_by_their_protocol_not_by_the_best_file() -> None:
    a = eval_result("a", ordinary_ppl(1, n=4), n_seq=12)
    b = eval_result("b", ordinary_ppl(2, n=4), n_seq=12)
    board = board_of(a, b)
    assert [p.split(":")[0] for p in board.partial] == ["a is partial", "b is partial"]
    whole = eval_result("c", ordinary_ppl(3, n=12))
    cut = [r.model_copy(update={"protocol": whole.protocol}) for r in (a, b)]
    board = board_of(whole, *cut)
    assert [r.label for r in board.rows] == ["c"]
    assert "a finished 4 of 12 sequences and is not ranked." in findings(board)


def test_different_token_counts_are_refused() -> None:
    a, b = eval_result("a", ordinary_ppl(1)), eval_result("b", ordinary_ppl(2))
    short = b.sequences[7].model_copy(update={"n_scored": 100})
    b = b.model_copy(update={"sequences": (*b.sequences[:7], short, *b.sequences[8:])})
    with pytest.raises(ResultError, match="sequence 7 has 2047 scored tokens in the one and 100"):
        board_of(a, b)


def test_equal_values_are_ranked_as_equal() -> None:
    board = compare_published(
        [
            Aggregate("A", corpus_ppl=1.5, median_ppl=2.5),
            Aggregate("B", corpus_ppl=1.5, median_ppl=2.5),
        ]
    )
    assert {order(r) for r in board.rankings} == {"A = B"}
    assert order(ranking("x", {"c": 3.0, "b": 1.0, "a": 1.0})) == "a = b < c"
    assert order(ranking("x", {"c": 3.0, "b": 1.0, "a": 1.0}), ["c", "b"]) == "b < c"


# --- which file to take ---


def test_of_files_that_are_not_told_apart_the_smallest_is_taken() -> None:
    base = ordinary_ppl(31)
    noise = np.random.default_rng(32).normal(0, 0.02, (2, 128))
    large = eval_result("large", base * np.exp(noise[0]), n_bytes=2_000_000)
    small = eval_result("small", base * np.exp(noise[1]), n_bytes=1_000_000)
    far = eval_result("far", base * 1.2, n_bytes=900_000)
    found = recommended(board_of(large, small, far))
    assert (found.take, found.rival, found.resolved) == ("small", "large", False)
    assert found.smaller == ("far",)


def test_kld_decides_where_all_files_have_it() -> None:
    base = ordinary_ppl(11)
    kld = np.random.default_rng(1).gamma(4, 0.01, 128)
    lucky = eval_result("lucky", base * 0.99, reference=("BF16", base), kld=kld)
    honest = eval_result("honest", base * 1.01, reference=("BF16", base), kld=kld * 0.7)
    found = recommended(board_of(lucky, honest))
    assert (found.take, found.rival, found.by, found.resolved) == (
        "honest",
        "lucky",
        "mean_kld",
        True,
    )
    assert found.pair is not None
    assert found.pair.ratios["mean_kld"].value == pytest.approx(0.7)


def test_published_means_and_medians_that_part_give_no_verdict() -> None:
    found = recommended(compare_published(published.GLM_4_7_FLASH))
    assert found.take is None
    assert found.preferred == (("median_ppl", "BF16"), ("corpus_ppl", "RAM"))
