"""Reading what eval, plan and measure wrote; and the commands compare and report."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import published
from made_plans import made_measurement, made_plan
from made_results import N_TOKENS, eval_result, journal, ordinary_ppl, wild_ppl
from ramgguf.cli.app import app
from ramgguf.core.errors import RamggufError, ResultError
from ramgguf.evaluate.common_sequences import check_comparable
from ramgguf.evaluate.comparison import compare_published
from ramgguf.evaluate.leaderboard import Aggregate
from ramgguf.evaluate.published_table import published_table
from ramgguf.evaluate.result import quantiles
from ramgguf.evaluate.result_files import read_material
from ramgguf.llama.protocol import encode_float32
from ramgguf.report.boards import board_csv
from ramgguf.report.results import eval_json


def test_a_journal_gives_back_its_results(tmp_path: Path) -> None:
    a, b = eval_result("a", ordinary_ppl(1)), eval_result("b", ordinary_ppl(2))
    klds = np.random.default_rng(3).gamma(1, 0.1, (128, N_TOKENS))
    with_tokens = tuple(
        s.model_copy(update={"token_kld": encode_float32(k)})
        for s, k in zip(b.sequences, klds, strict=True)
    )
    b = b.model_copy(update={"sequences": with_tokens})
    path = tmp_path / "scores.jsonl"
    journal(path, a)
    journal(path, b)
    found = read_material([path]).results
    assert [r.model.label for r in found] == ["a", "b"]
    assert [r.sequences for r in found] == [a.sequences, b.sequences]
    assert found[0].kld_quantiles is None
    assert found[1].kld_quantiles == quantiles(klds.astype(np.float32).ravel())
    assert (found[0].seconds, found[0].decode_seconds) == (256.0, 192.0)


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    a = eval_result("a", ordinary_ppl(1))
    journal(path, a)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    (found,) = read_material([path]).results
    assert found.sequences == a.sequences[:-1]
    assert path.read_bytes() == whole[:-20]  # reading changes nothing


def test_a_failed_run_keeps_its_sequences_and_its_failure(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    journal(path, eval_result("a", ordinary_ppl(1)), n=5, fails="died of SIGSEGV in sequence 5")
    (found,) = read_material([path]).results
    assert len(found.sequences) == 5
    assert found.failure == "died of SIGSEGV in sequence 5"


def test_of_two_runs_of_a_model_the_last_that_scored_counts(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    a = eval_result("a", ordinary_ppl(1))
    safe = a.model_copy(update={"engine": a.engine.model_copy(update={"safe_kernels": True})})
    journal(path, a, n=2, fails="died")
    journal(path, safe)
    (found,) = read_material([path]).results
    assert found.engine.safe_kernels
    assert len(found.sequences) == 128
    assert found.failure is None


def test_every_kind_of_file_is_told_by_its_content(tmp_path: Path) -> None:
    measured = made_measurement(1)
    plan = made_plan(measured)
    a, b = eval_result("a", ordinary_ppl(1)), eval_result("b", ordinary_ppl(2))
    measured.save(tmp_path / "curves.json")
    plan.save(tmp_path / "chosen.json")
    a.save(tmp_path / "a.json")
    text = eval_json([b])
    (tmp_path / "both.json").write_text(text, encoding="utf-8")
    found = read_material([tmp_path / f"{n}.json" for n in ("curves", "chosen", "a", "both")])
    assert found.results == (a, b)
    assert found.plans == (("chosen", plan),)
    assert found.measurements == (("curves", measured),)


@pytest.mark.parametrize(
    "figures", [published.GLM_4_7_FLASH, published.QWEN3_30B_A3B, published.LLAMA_4_SCOUT]
)
def test_published_figures_survive_their_csv(
    tmp_path: Path, figures: tuple[Aggregate, ...]
) -> None:
    path = tmp_path / "figures.csv"
    path.write_text(board_csv(compare_published(figures)))
    assert set(read_material([path]).aggregates) == set(figures)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "{", "is not JSON"),
        ("x.json", "[]", "schema is ''; expected what eval, plan or measure wrote"),
        ("x.json", '{"schema": "ramgguf.plan/9"}', "schema is 'ramgguf.plan/9'"),
        ("x.json", '{"schema": "ramgguf.eval/1"}', "Field required"),
        ("x.jsonl", "hello\n", "line 1 is no record"),
        ("x.jsonl", "", "has no evaluation"),
        ("x.csv", "", "has no column 'model'"),
        ("x.csv", "maker,ppl\na,1\n", "has no column 'model'"),
        ("x.csv", "model,speed\na,1\n", "has no figures"),
        ("x.csv", "model,size,ppl\na,big,1\n", "the size of a is 'big'"),
        ("x.csv", "model,corpus_ppl\na,1,2\n", "row of a has 3 cells of 2"),
        ("x.csv", "model,corpus_ppl\na,-1\n", "corpus_ppl of a is '-1'"),
        ("x.csv", "model,corpus_ppl\na,nan\n", "corpus_ppl of a is 'nan'"),
        ("x.csv", "model,corpus_ppl\na,ten\n", "corpus_ppl of a is 'ten'"),
    ],
)
def test_other_files_are_refused_by_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RamggufError, match=message) as raised:
        read_material([tmp_path / name])
    assert name in str(raised.value)


def test_lines_of_whole_results_end_in_newlines_only(tmp_path: Path) -> None:
    result = eval_result("a", ordinary_ppl(1)[:3])
    text = result.text.model_copy(update={"name": "one\u2028two\u0085three"})
    document = json.loads(result.model_copy(update={"text": text}).to_json())
    line = json.dumps({"result": document}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    names = [r.text.name for r in read_material([tmp_path / "x.jsonl"]).results]
    assert names == [text.name] * 2


def test_missing_and_binary_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"nowhere\.json: cannot be read"):
        read_material([tmp_path / "nowhere.json"])
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match=r"x\.json: byte 0 is not UTF-8"):
        read_material([tmp_path / "x.json"])


# --- the commands ---


def run(*arguments: str | Path) -> str:
    outcome = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "scores.jsonl"
    journal(path, eval_result("tame", ordinary_ppl(1) * 1.1))
    journal(path, eval_result("wild", wild_ppl(1)))
    return path


def test_compare_prints_rankings_and_findings(scores: Path) -> None:
    text = run("compare", scores)
    assert text.startswith(
        "wild: same size, better on 123 of 128 sequences; mean and median ΔNLL part."
    )
    assert "Distrust corpus PPL and mean PPL: 5 sequences of 128 outweigh the rest." in text
    assert "Distrust mean PPL of wild: the tail is heavy" in text
    assert "wild < tame" in text
    assert "5 sequences cause it" in text


def test_compare_writes_each_form(scores: Path) -> None:
    document = json.loads(run("compare", scores, "--json"))
    assert document["rankings"]["median_ppl"][0] == "wild"
    assert document["orders"]["median_ppl"] == "wild < tame"
    assert document["verdict"][0].startswith("wild: ")
    assert run("compare", scores, "--markdown").startswith("### Evaluation")
    assert run("compare", scores, "--csv").splitlines()[1].startswith("tame,")
    assert run("compare", scores, "--outlier", "1", "--csv").splitlines()[1].count(",1.0,128,") == 1


def test_compare_judges_published_figures(tmp_path: Path) -> None:
    path = tmp_path / "glm.csv"
    path.write_text(board_csv(compare_published(published.GLM_4_7_FLASH)))
    text = run("compare", path)
    assert "Full inversion: corpus PPL ranks RAM < RAM v1 < BF16" in text
    assert "significant is unknown" in text
    assert "58.2 GB" in text
    assert json.loads(run("compare", path, "--json"))["rankings"]["corpus_ppl"][0] == "RAM"
    assert "| BF16 | 58.2 GB | 11.344 |" in run("compare", path, "--markdown")


def test_compare_refuses_what_may_not_be_ranked_together(tmp_path: Path, scores: Path) -> None:
    other = eval_result("other", ordinary_ppl(3)).model_copy(update={"tokenizer_sha256": "x"})
    other.save(tmp_path / "other.json")
    with pytest.raises(ResultError, match="may not be ranked together"):
        run("compare", scores, tmp_path / "other.json")
    figures = tmp_path / "figures.csv"
    figures.write_text("model,corpus_ppl\na,1\n")
    with pytest.raises(ResultError, match="published figures have no sequences"):
        run("compare", scores, figures)
    made_measurement(1).save(tmp_path / "curves.json")
    with pytest.raises(ResultError, match="at least one result"):
        run("compare", tmp_path / "curves.json")


def test_report_draws_a_page_and_overwrites_only_when_told(tmp_path: Path, scores: Path) -> None:
    pytest.importorskip("plotly")
    made_measurement(1).save(tmp_path / "curves.json")
    page = tmp_path / "page.html"
    run("report", scores, tmp_path / "curves.json", "-o", page)
    assert page.read_text().startswith("<!doctype html>")
    with pytest.raises(RamggufError, match="--force"):
        run("report", scores, "-o", page)
    assert "Rate–distortion" in page.read_text()
    run("report", scores, "-o", page, "--force")
    assert "Rate–distortion" not in page.read_text()


@pytest.mark.parametrize("style", [[], ["--markdown"], ["--json"]])
def test_compare_names_a_model_that_finished_no_sequence(tmp_path: Path, style: list[str]) -> None:
    path = tmp_path / "scores.jsonl"
    journal(path, eval_result("a", ordinary_ppl(1)))
    journal(path, eval_result("b", ordinary_ppl(2)), n=0, fails="died of SIGSEGV while loading")
    found = CliRunner().invoke(app, ["compare", str(path), *style])
    assert found.exit_code == 0, found.output
    assert "died of SIGSEGV while loading" in found.output.replace("\n", " ")


def test_results_of_different_batch_sizes_are_not_ranked_together() -> None:
    a = eval_result("a", ordinary_ppl(1))
    b = eval_result("b", ordinary_ppl(2))
    doubled = b.engine.model_copy(update={"n_batch": b.engine.n_batch * 2})
    with pytest.raises(ResultError, match="tokens per batch: 2048 for a, 4096 for b"):
        check_comparable([a, b.model_copy(update={"engine": doubled})])


# --- pasted tables ---


GLM = """Condition,Mean PPL,Median PPL,Outliers (>100),Size
BF16 (unquantized),11.344,8.706,5,58.2 GB
RAM v1 (best),9.930,9.084,4,15.9GB
RAM,9.427,9.210,0,15.8 GB
"""


NUMBERS = [  # header, two rows, then bytes and corpus PPL of both
    ("size,ppl", "8540 MB,1234", "4920 MB,987.5", [(8.54e9, 1234), (4.92e9, 987.5)]),
    ("size;ppl", "8,540 MB;1,234", "4,920 MB;987.5", [(8.54e9, 1234), (4.92e9, 987.5)]),
    ("size;ppl", "8,540 MB;7.1", "4,920 MB;7.3", [(8.54e9, 7.1), (4.92e9, 7.3)]),
    ("size;ppl", "8,540 MB;7", "4,920 MB;8", [(8.54e9, 7), (4.92e9, 8)]),
    ("size (MB);ppl", "8,540;7", "4,920;8", [(8.54e9, 7), (4.92e9, 8)]),
    ("size;ppl", "4,92 GB;8,706", "5,1 GB;9,123", [(4.92e9, 8.706), (5.1e9, 9.123)]),
    ("size;ppl", "4,92 GB;1.234,5", "5 GB;987,5", [(4.92e9, 1234.5), (5e9, 987.5)]),
    ("size;ppl", "4.920 MB;8,7", "5.120 MB;9,1", [(4.92e9, 8.7), (5.12e9, 9.1)]),
    ("size;ppl", "4,92 GB;8.706", "5 GB;9.12", [(4.92e9, 8.706), (5e9, 9.12)]),
    ("bytes;ppl", "4,920,000,000;8.7", "5,100,000,000;9.1", [(4.92e9, 8.7), (5.1e9, 9.1)]),
]


@pytest.mark.parametrize(("header", "a", "b", "expected"), NUMBERS)
def test_commas_are_what_the_tables_numbers_say(
    header: str, a: str, b: str, expected: list[tuple[float, float]]
) -> None:
    mark = ";" if ";" in header else ","
    lines = (f"model{mark}{header}", f"a{mark}{a}", f"b{mark}{b}")
    found, notes = published_table("\n".join(lines), name="t.csv")
    assert [(x.n_bytes, x.corpus_ppl) for x in found] == expected
    assert notes == ()


def test_a_comma_that_no_number_explains_is_noted_or_refused() -> None:
    _, notes = published_table("model;ppl\na;8,706\nb;9,123", name="t.csv")
    assert notes == ("'ppl': 8,706 is read as 8.706",)
    _, notes = published_table("model;size;ppl\na;5.5 GB;1,234\nb;6.1 GB;2,345", name="t.csv")
    assert notes == ("'ppl': 1,234 is read as 1234",)
    with pytest.raises(ResultError, match=r"corpus_ppl of a is '8\.706'.*write all with a decimal"):
        published_table("model;size;ppl\na;4,92 GB;8.706\nb;5,1 GB;9.123", name="t.csv")
    with pytest.raises(ResultError, match="corpus_ppl of c is '1,234'"):
        published_table("model;ppl\na;4,92\nb;9.12\nc;1,234", name="t.csv")


@pytest.mark.parametrize("form", ["comma", "bom", "semicolon", "tab", "pipe", "decimal comma"])
def test_a_pasted_table_is_read_whatever_separates_its_columns(tmp_path: Path, form: str) -> None:
    rows = [line.split(",") for line in GLM.splitlines()]
    made = {
        "comma": GLM,
        "bom": "\ufeff" + GLM,
        "semicolon": GLM.replace(",", ";"),
        "tab": GLM.replace(",", "\t"),
        "pipe": "\n".join(["| " + " | ".join(r) + " |" for r in (rows[0], ["---"] * 5, *rows[1:])]),
        "decimal comma": GLM.replace(",", ";").replace(".", ","),
    }[form]
    path = tmp_path / ("pasted.md" if form == "pipe" else "pasted.csv")
    path.write_text(made, encoding="utf-8")
    found = read_material([path])
    assert [(a.label, a.corpus_ppl, a.median_ppl, a.n_outliers) for a in found.aggregates] == [
        ("BF16 (unquantized)", 11.344, 8.706, 5),
        ("RAM v1 (best)", 9.93, 9.084, 4),
        ("RAM", 9.427, 9.21, 0),
    ]
    assert [a.n_bytes for a in found.aggregates] == [58_200_000_000, 15_900_000_000, 15_800_000_000]
    assert "'Mean PPL' is taken as corpus PPL" in found.notes[0]
    text = run("compare", path)
    assert "Full inversion" in text
    assert "is taken as corpus PPL" in text


def test_a_family_column_tells_models_apart_and_unknown_columns_are_reported(
    tmp_path: Path,
) -> None:
    path = tmp_path / "families.csv"
    path.write_text(
        "Model,Condition,Size (GB),PPL,tokens/s\nGLM,RAM,15.8,9.4,30\nQwen,RAM,16,8.9,–\n"
    )
    found = read_material([path])
    assert [(a.label, a.n_bytes) for a in found.aggregates] == [
        ("GLM RAM", 15_800_000_000),
        ("Qwen RAM", 16_000_000_000),
    ]
    assert found.notes == ("columns that are not understood: tokens/s",)


def test_our_own_arithmetic_mean_is_not_taken_for_the_corpus_value(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("model,corpus_ppl,mean_ppl\na,9.0,12.0\n")
    (a,) = read_material([path]).aggregates
    assert (a.corpus_ppl, a.mean_ppl) == (9.0, 12.0)
    assert read_material([path]).notes == ()


# --- files that must not pass ---


def _spoilt(tmp_path: Path, **changes: object) -> Path:
    document = json.loads(eval_result("a", ordinary_ppl(1, n=8)).to_json())
    document["sequences"][3].update(changes)
    path = tmp_path / "spoilt.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nll_sum": -500.0}, "nll_sum of sequence 3 is -500, expected ≥ 0"),
        ({"index": 2}, "sequence 2 is there twice"),
        ({"reference_nll_sum": -9.0}, "reference_nll_sum of sequence 3 is -9"),
        ({"kld_sum": -9.0}, "kld_sum of sequence 3 is -9"),
        ({"n_same_top": 5000}, "5000 equal top tokens of 2047 scored"),
    ],
)
def test_impossible_scores_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = _spoilt(tmp_path, **changes)
    with pytest.raises(RamggufError, match=message) as raised:
        read_material([path])
    assert "\n" not in str(raised.value)
    assert "Value error" not in str(raised.value)


def test_a_file_of_one_whole_result_a_line_is_read(tmp_path: Path) -> None:
    results = [eval_result(name, ordinary_ppl(i)) for i, name in enumerate("ab")]
    lines = [json.dumps({"bench": "x", "result": json.loads(r.to_json())}) for r in results]
    path = tmp_path / "bench.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert read_material([path]).results == tuple(results)
    path.write_text("\n".join(lines) + "\nnothing\n")
    with pytest.raises(ResultError, match="line 3 holds no result"):
        read_material([path])


def test_the_recorded_run_of_the_bench_opens() -> None:
    path = Path(__file__).parents[2] / "bench" / "results" / "ram_smol135.jsonl"
    text = run("compare", path)
    assert text.startswith("smol135-f16-Q8_0: ")
    assert "smol135-f16 < smol135-f16-Q8_0 < smol135-f16-42pct" in text


@pytest.mark.parametrize("heading", ["kld_mean", "KLD mean (nats)", "Mean KLD", "avg_kld"])
def test_a_mean_kld_is_understood_whichever_word_comes_first(tmp_path: Path, heading: str) -> None:
    table = tmp_path / "t.csv"
    table.write_text(f"model,ppl_median,{heading}\na,9,0.02\nb,8,0.03\n")
    found = read_material([table])
    assert [a.mean_kld for a in found.aggregates] == [0.02, 0.03]
    assert [a.median_ppl for a in found.aggregates] == [9, 8]
    assert found.notes == ()


@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_where_no_two_models_have_one_figure_there_are_no_rankings(
    tmp_path: Path, style: list[str]
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("model,ppl,kld\na,9,\nb,,0.03\n")
    done = CliRunner().invoke(app, ["compare", str(table), *style])
    assert done.exit_code == 0, done.output
    assert "0.030" in done.output
    assert "Rankings" not in done.output
    assert "ranked by" not in done.output
