"""Where KLD falls: by position in the window, by class of token, the worst tokens."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from made_results import eval_result, ordinary_ppl
from ramgguf.cli.app import app
from ramgguf.core.errors import EngineError, ResultError
from ramgguf.evaluate.comparison import compare_results
from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.protocol import EvalProtocol, ProtocolName, Tokens, ram_windows, warm_windows
from ramgguf.evaluate.recommendation import recommend
from ramgguf.evaluate.result import EvalResult, TokenSums, kld_figures
from ramgguf.evaluate.summary import summarize
from ramgguf.evaluate.token_groups import (
    TOKEN_CLASSES,
    TokenFigures,
    by_position,
    class_of,
    first_sums,
    group_label,
    group_start,
    position_group,
    worst_tokens,
)
from ramgguf.llama.protocol import decode_bits, encode_bits, encode_float32
from ramgguf.report.evaluation import print_report, report_json, statements
from ramgguf.report.page import page
from ramgguf.report.verdict import verdict_lines
from ramgguf.report.where import where_grids
from ramgguf.report.where_figure import kld_by_position


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (" the", "word"),
        (" Überfluß", "word"),
        (" don't", "word"),
        ("'s", "word"),
        ("ing", "word, continued"),
        ("日本", "word, continued"),
        (" 2048", "number"),
        ("3.14", "number"),
        ("\n\n", "whitespace"),
        (" ", "whitespace"),
        (" ,", "punctuation"),
        ('."', "punctuation"),
        (" {", "code"),
        ("self_attn", "code"),
        ("()=>", "code"),
        (" @", "code"),
        ("\ufffd", "piece"),
        ("🙂", "other"),
        ("x86", "other"),
        ("", "other"),
    ],
)
def test_a_token_is_of_one_class(text: str, name: str) -> None:
    assert TOKEN_CLASSES[class_of(text)][0] == name


@given(st.text(max_size=12))
def test_every_text_has_a_class(text: str) -> None:
    assert 0 <= class_of(text) < len(TOKEN_CLASSES)


def test_groups_of_positions_are_powers_of_two_and_cover_all() -> None:
    groups = position_group(np.arange(5000))
    for group in np.unique(groups):
        inside = np.flatnonzero(groups == group)
        assert inside[0] == group_start(int(group))
        ends = f"{inside[0]}–{inside[-1]}" if len(inside) > 1 else f"{inside[0]}"
        if inside[-1] < 4095:
            assert group_label(int(group)) == ends


def figures(rng: np.random.Generator, n: int, first: int = 1) -> TokenFigures:
    texts = [rng.choice([b" word", b"ing", b",", b" 12", b" {", b"\xe2"]) for _ in range(n)]
    return TokenFigures(
        positions=np.arange(first, first + n),
        texts=texts,
        kld=rng.gamma(1.0, 0.02, n),
        same_top=rng.random(n) < 0.9,
        nll=rng.gamma(2.0, 1.0, n),
        reference_nll=rng.gamma(2.0, 1.0, n),
    )


def test_sums_over_groups_equal_a_loop_over_tokens() -> None:
    found = figures(np.random.default_rng(0), 500)
    position, kind = found.by_position(), found.by_class()
    for k in range(len(position.n)):
        inside = [i for i, p in enumerate(found.positions) if group_start(k) <= p < 2**k]
        assert position.n[k] == len(inside)
        assert position.kld_sum[k] == pytest.approx(sum(found.kld[i] for i in inside))
        assert position.n_same_top[k] == sum(bool(found.same_top[i]) for i in inside)
    for k, (name, _) in enumerate(TOKEN_CLASSES):
        of = {b" word": "word", b"ing": "word, continued", b",": "punctuation", b" 12": "number"}
        of |= {b" {": "code", b"\xe2": "piece"}
        inside = [i for i, text in enumerate(found.texts) if of[text] == name]
        assert kind.n[k] == len(inside)
        assert kind.kld_sum[k] == pytest.approx(sum(found.kld[i] for i in inside))


def test_the_worst_tokens_are_the_largest_and_none_of_the_first_eight() -> None:
    found = figures(np.random.default_rng(1), 300, first=0)
    found.kld[3], found.kld[200] = 50.0, 40.0
    worst = found.worst()
    assert [w.position for w in worst] == [int(i) for i in np.argsort(-found.kld) if i >= 8][
        : len(worst)
    ]
    assert worst[0].position == 200
    assert worst[0].kld == 40.0
    assert worst[0].text == found.texts[200].decode("utf-8", "replace")
    assert worst[0].before == b"".join(found.texts[:200])[-60:].decode("utf-8", "ignore")


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back_as_they_went(values: list[bool]) -> None:
    assert decode_bits(encode_bits(values), len(values)).tolist() == values


def test_bits_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="bits for 9 values"):
        decode_bits(encode_bits([True] * 8), 9)


# --- results whose first tokens decide ---


def with_positions(result: EvalResult, first: float, late: float, tail: float = 0.0) -> EvalResult:
    """Return the result with 7 first tokens of mean KLD `first`, 2,040 of about `late`.

    tail is the KLD of one token in a thousand.
    """
    rng = np.random.default_rng(len(result.model.path))
    sequences = []
    for s in result.sequences:
        kld = rng.gamma(4, late / 4, s.n_scored)
        kld[100::1000] += tail
        kld[:7] = first * rng.gamma(4, 0.25, 7)
        own = TokenFigures(
            np.arange(1, s.n_scored + 1),
            [b" word"] * s.n_scored,
            kld,
            kld < 0.5,
            kld,
            None,
        )
        update = {
            "kld_sum": float(kld.sum()),
            "token_kld": encode_float32(kld),
            "by_position": own.by_position(),
            "by_class": own.by_class(),
            "worst_tokens": own.worst(),
        }
        sequences.append(s.model_copy(update=update))
    update = {"sequences": tuple(sequences), **kld_figures(sequences)}
    return result.model_copy(update=update)


def klds(result: EvalResult) -> npt.NDArray[np.float64]:
    """Return the KLD of every token, a row per sequence."""
    rows = [row for s in result.sequences if (row := s.kld_per_token()) is not None]
    return np.stack(rows).astype(np.float64)


def against_base(label: str, ppl: float = 1.02) -> EvalResult:
    base = ordinary_ppl(3, 24)
    return eval_result(label, base * ppl, reference=("F16", base), kld=np.full(24, 0.02))


def flipped() -> EvalReport:
    """a is better from the 8th token on, b in the mean of all: the first tokens decide."""
    a = with_positions(against_base("a"), first=8.0, late=0.012)
    b = with_positions(against_base("bb"), first=0.5, late=0.022)
    return eval_report([a, b], np.random.default_rng(0))


def test_first_tokens_that_flip_the_ranking_by_kld_do_not_decide_the_verdict() -> None:
    report = flipped()
    assert report.board is not None
    orders = {r.criterion: r.order for r in report.board.rankings}
    assert orders["mean_kld"] == ("bb", "a")
    assert orders["late_kld"] == ("a", "bb")
    found = recommend(report.board)
    assert found is not None
    assert (found.take, found.by, found.resolved) == ("a", "late_kld", True)
    first, second, *_ = verdict_lines(report)
    assert first.startswith("a: same size, KLD from token 8 on 0.5")
    assert second.startswith("Distrust mean KLD: without the first 8 tokens")
    said = " ".join(statements(report))
    assert "The first 8 tokens of each window carry much of the KLD:" in said
    assert "of a's" in said
    assert "by median a < bb" in said


def test_first_tokens_that_change_nothing_are_not_mentioned() -> None:
    a = with_positions(against_base("a"), first=0.02, late=0.012)
    b = with_positions(against_base("bb"), first=0.03, late=0.022)
    report = eval_report([a, b], np.random.default_rng(0))
    assert report.board is not None
    found = recommend(report.board)
    assert found is not None
    assert (found.take, found.by) == ("a", "mean_kld")
    said = " ".join((*statements(report), *verdict_lines(report)))
    assert "first 8 tokens" not in said
    assert "worst 0.1 %" not in said
    assert "by median" not in said


def test_a_few_tokens_that_carry_the_mean_are_said() -> None:
    a = with_positions(against_base("a"), first=0.02, late=0.002, tail=2.0)
    (summary,) = (s for s in eval_report([a]).summaries if s.against)
    assert summary.against is not None
    assert summary.against.quantiles is not None
    kld = np.sort(klds(a).ravel())
    n = -(-len(kld) // 1000)
    assert summary.against.quantiles.worst_share is not None
    assert summary.against.quantiles.worst_share == pytest.approx(kld[-n:].sum() / kld.sum())
    assert summary.against.quantiles.worst_share > 0.25
    (said,) = (x for x in statements(eval_report([a])) if "worst 0.1 %" in x)
    assert said.startswith("The worst 0.1 % of the tokens carry much of the KLD: ")
    assert f"{summary.against.quantiles.worst_share:.0%} of a's (mean 0.00" in said


def test_the_first_tokens_are_reported_apart() -> None:
    a = with_positions(against_base("a"), first=8.0, late=0.012)
    found = summarize(a).against
    assert found is not None
    assert found.first is not None
    kld = klds(a)
    assert found.first.kld == pytest.approx(kld[:, :7].mean(), rel=1e-6)
    assert found.first.share_of_tokens == pytest.approx(7 / 2047)
    assert found.first.share_of_kld == pytest.approx(kld[:, :7].sum() / kld.sum(), rel=1e-6)
    late = found.divergences["late_kld"]
    assert late.value == pytest.approx(kld[:, 7:].mean(), rel=1e-6)
    assert late.low is not None
    assert late.low < late.value


def test_positions_outlive_the_tokens_values_and_reach_tables_and_json() -> None:
    report = flipped()
    slim = [s.result.without_tokens() for s in report.summaries if s.against]
    assert all(s.kld_per_token() is None for r in slim for s in r.sequences)
    again = eval_report([EvalResult.from_json(r.to_json()) for r in slim], np.random.default_rng(0))
    assert [g.rows for g in where_grids(again)] == [g.rows for g in where_grids(report)]
    position, kind, worst = where_grids(again)
    assert [row[0] for row in position.rows][:4] == ["1", "2–3", "4–7", "8–15"]
    assert [row[0] for row in kind.rows] == ["word"]
    assert worst.rows[0][-1].endswith("⟦ word⟧")
    document = report_json(again)
    assert isinstance(document["where"], list)
    (first, _) = document["where"]
    assert first["by_position"][0]["n"] == 24
    groups = by_position(slim[0])
    assert sum(g.share for g in groups) == pytest.approx(1)
    assert len(worst_tokens(slim[0], 12)) == 12


def test_the_page_draws_where_models_part_and_escapes_the_texts_of_tokens() -> None:
    pytest.importorskip("plotly")
    a = with_positions(against_base("a"), first=8.0, late=0.012)
    worst = a.sequences[0].worst_tokens[0].model_copy(update={"text": "<script>\u202e", "kld": 9.0})
    first = a.sequences[0].model_copy(update={"worst_tokens": (worst,)})
    a = a.model_copy(update={"sequences": (first, *a.sequences[1:])})
    text = page(eval_report([a]))
    assert "Where the models part from the reference" in text
    assert 'aria-label="Mean KLD by position in the window"' in text
    assert "⟦&lt;script&gt;\\u202e⟧" in text
    assert "<td>8–15</td>" in text
    figure = kld_by_position(eval_report([a]))
    assert figure is not None
    (line,) = (t for t in figure.data if t.mode == "lines+markers")
    assert list(line.y) == [g.kld for g in by_position(a)]
    assert kld_by_position(eval_report([against_base("a")])) is None


def test_results_without_positions_are_ranked_by_mean_kld_as_before() -> None:
    a, b = against_base("a"), against_base("bb", 1.03)
    board = compare_results([a, with_positions(b, 0.1, 0.03)])
    assert [r.order for r in board.rankings if r.criterion == "late_kld"] == [("bb",)]
    found = recommend(board)
    assert found is not None
    assert found.by == "mean_kld"
    assert where_grids(eval_report([a])) == []


def test_where_is_printed_refused_or_said_to_be_unknown() -> None:
    def printed(result: EvalResult) -> str:
        console = Console(file=io.StringIO(), width=200)
        print_report(eval_report([result]), console, where=True)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    assert "KLD by class of token" in printed(with_positions(against_base("a"), 0.1, 0.03))
    assert "these results do not say where KLD falls" in printed(against_base("a"))


def test_where_has_no_place_in_csv_or_published_figures(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("model,n_bytes,median_ppl\na,5,3.0\nb,6,2.0\n")
    run = CliRunner().invoke(app, ["compare", str(table), "--where", "--csv"])
    assert run.exit_code == 2
    with pytest.raises(ResultError, match="published figures have no tokens"):
        CliRunner().invoke(
            app, ["compare", str(table), "--where"], catch_exceptions=False, standalone_mode=False
        )


def test_groups_of_another_number_of_tokens_are_refused() -> None:
    score = against_base("a").sequences[0]
    with pytest.raises(ValueError, match=r"groups of 5 tokens, 2047 were scored"):
        type(score).model_validate(
            {
                **score.model_dump(),
                "by_position": TokenSums(n=(5,), kld_sum=(1.0,), n_same_top=(4,)),
            }
        )
    assert first_sums(score) is None


# --- the protocol warm ---


def text_tokens(n: int = 1000, warm_up: tuple[int, ...] = ()) -> Tokens:
    return Tokens(np.arange(n, dtype=np.int32), 2 * np.arange(1, n + 1), 1, True, warm_up)


def test_warm_windows_put_what_precedes_a_text_before_each_and_score_all_of_it() -> None:
    found = warm_windows(text_tokens(warm_up=(7, 8, 9)), n_ctx=67, n_seq=5, seed=1)
    assert found.protocol.n_warm_up == found.protocol.first_target == 3
    assert found.protocol.n_scored == 64
    same = ram_windows(text_tokens(), n_ctx=64, n_seq=5, seed=1)
    for warm, plain in zip(found.windows, same.windows, strict=True):
        assert warm.ids.tolist() == [7, 8, 9, *plain.ids.tolist()]
        assert (warm.text_start, warm.text_end) == (plain.text_start, plain.text_end)
        assert len(warm.ends) == 64


def test_a_model_without_anything_to_put_first_says_so_and_starts_at_the_second_token() -> None:
    found = warm_windows(text_tokens(), n_ctx=64, n_seq=5)
    assert found.protocol.first_target == 1
    assert "its windows start cold" in found.notes[-1]


def test_a_template_longer_than_half_a_window_is_refused() -> None:
    with pytest.raises(EngineError, match="starts with 40 tokens: more than half"):
        warm_windows(text_tokens(warm_up=(1,) * 40), n_ctx=64, n_seq=5)


@pytest.mark.parametrize("name", ["warm", "llama"])
def test_bos_is_an_option_of_ram_only(name: ProtocolName) -> None:
    protocol = replace(EvalProtocol(), protocol=name, bos=True, n_ctx=64)
    with pytest.raises(EngineError, match="--bos is of the protocol ram"):
        protocol.windows(text_tokens())
