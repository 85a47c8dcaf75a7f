"""What is printed and drawn: tables, model cards, CSV, JSON, and the page in a real browser."""

import csv
import html.parser
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import published
from made_plans import made_measurement, made_plan
from made_results import eval_result, ordinary_ppl, wild_ppl
from ramgguf.core.escape import markdown_text
from ramgguf.evaluate.comparison import compare_published
from ramgguf.evaluate.eval_report import EvalReport, eval_report
from ramgguf.evaluate.intervals import Estimate
from ramgguf.evaluate.leaderboard import Aggregate
from ramgguf.evaluate.result import EvalResult
from ramgguf.report import evaluation, results
from ramgguf.report.chart import board_chart
from ramgguf.report.figures import board_by_size, label_places, log_ticks
from ramgguf.report.grid import Column, Grid, to_html, to_markdown
from ramgguf.report.numbers import kld, ppl, with_interval
from ramgguf.report.page import page, write_html
from ramgguf.report.terminal import print_grid

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">[bold]&amp;|_*'


def three_models() -> list[EvalResult]:
    """Return a reference, a good and a wild quantization of it, on titled text."""
    base = ordinary_ppl(1)
    titles = [f"Article {i // 3}" for i in range(128)]
    rng = np.random.default_rng(2)
    wild = base * np.exp(rng.normal(0.05, 0.02, 128))
    wild[[7, 80]] = (300.0, 25_000.0)
    kept: dict[str, Any] = {
        "titles": titles,
        "reference": ("f16", base),
        "reference_bytes": 4_000_000,
    }
    return [
        eval_result("f16", base, titles=titles, n_bytes=4_000_000),
        eval_result(
            "good",
            base * 1.01,
            n_bytes=2_000_000,
            kld=rng.gamma(2, 0.004, 128),
            **kept,
        ),
        eval_result("wild", wild, n_bytes=1_000_000, kld=rng.gamma(2, 0.03, 128), **kept),
    ]


@pytest.fixture(scope="module")
def three() -> EvalReport:
    return eval_report(three_models())


def printed(made: EvalReport, *, terminal: bool, width: int) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=width, color_system=None, highlight=False
    )
    evaluation.print_report(made, console)
    return out.getvalue()


# --- terminal ---


def test_a_pipe_gets_every_column_on_one_line_per_model(three: EvalReport) -> None:
    lines = printed(three, terminal=False, width=80).splitlines()
    (heading,) = [line for line in lines if line.startswith("model") and "P95" in line]
    for column in ("size", "bpw", "corpus PPL", "median PPL", "P99", "MAD", "PPL > 100", "tail"):
        assert column in heading
    (wild,) = [line for line in lines if line.startswith("wild") and "heavy-tailed" in line]
    assert "25,000" in wild
    assert "1.00 MB" in wild
    assert not any(line.startswith("not shown") for line in lines)


@pytest.mark.parametrize("width", [60, 80, 100, 140, 250])
def test_a_terminal_is_never_overrun_and_told_what_is_left_out(
    three: EvalReport, width: int
) -> None:
    text = printed(three, terminal=True, width=width)
    assert max(map(len, text.splitlines())) <= width
    for line in text.splitlines():
        if line.startswith("model"):
            assert "PPL" in line
    assert ("not shown in this width" in text) == (width < 250)
    assert text.count("wild") > 2


def test_the_same_results_always_print_the_same(three: EvalReport) -> None:
    models = three_models()
    assert results.eval_csv(models) == results.eval_csv(models)
    out = io.StringIO()
    results.print_eval(models, Console(file=out))
    assert "Protocol ram: 128 windows of 2048 tokens" in out.getvalue()
    assert "intervals over 43 articles" in out.getvalue()


def test_file_names_are_not_taken_for_markup() -> None:
    grid = Grid("a [b] title", (Column("model", number=False),), (("[red]name[/red]",),))
    out = io.StringIO()
    print_grid(Console(file=out, force_terminal=True, color_system=None, width=40), grid)
    assert "[red]name[/red]" in out.getvalue()


def test_results_that_may_not_be_ranked_are_shown_with_the_reason() -> None:
    a, b = eval_result("a", ordinary_ppl()), eval_result("b", ordinary_ppl(1))
    made = eval_report(
        [a, b.model_copy(update={"tokenizer_sha256": "other"})], np.random.default_rng(0)
    )
    text = printed(made, terminal=False, width=80)
    assert made.board is None
    assert "ranked by" not in text
    assert "Not ranked: models/a.gguf and models/b.gguf" in text
    assert text.count("light-tailed") == 2


def test_a_model_without_scores_is_named_beside_the_others() -> None:
    a, b = eval_result("a", ordinary_ppl()), eval_result("b", ordinary_ppl(1))
    dead = b.model_copy(update={"sequences": (), "failure": "died of SIGSEGV in sequence 0"})
    text = printed(eval_report([a, dead], np.random.default_rng(0)), terminal=False, width=80)
    assert "b: no sequence was scored (died of SIGSEGV in sequence 0)." in text
    assert "light-tailed" in text


# --- markdown, CSV, JSON ---


def test_markdown_has_a_row_per_model_and_equal_columns(three: EvalReport) -> None:
    text = evaluation.report_markdown(three)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}
        assert len(widths) == 1
    assert [len(t.strip().splitlines()) - 2 for t in tables[:2]] == [3, 2]
    assert "Distrust mean PPL of wild: the tail is heavy" in text
    assert text.startswith("### Evaluation\n\ngood: ")


@settings(deadline=None)  # the first example waits for an import
@given(st.text(max_size=40))
def test_markdown_text_survives_being_rendered(text: str) -> None:
    from markdown_it import MarkdownIt

    row = to_markdown(Grid("", (Column("a"), Column("b")), ((f"x{text}x", "last"),)))
    tokens = MarkdownIt().enable("table").parse(row)
    cells = [t.content for t in tokens if t.type == "inline"]
    assert cells[2:][-1] == "last"
    assert len(cells) == 4
    assert "<" not in re.sub(r"\\<|<!-- -->", "", markdown_text(text))


def test_csv_has_full_precision_and_leaves_unknown_values_empty(three: EvalReport) -> None:
    rows = list(csv.DictReader(io.StringIO(evaluation.report_csv(three))))
    assert [r["model"] for r in rows] == ["f16", "good", "wild"]
    for row, summary in zip(rows, three.summaries, strict=True):
        assert float(row["corpus_ppl"]) == summary.estimates["corpus_ppl"].value
        assert float(row["corpus_ppl_low"]) == summary.estimates["corpus_ppl"].low
        assert row["p99_ppl_low"] == ""
    assert rows[0]["mean_kld"] == ""
    assert float(rows[2]["mean_kld"]) > 0
    assert rows[2]["n_outliers"] == "2"


def test_json_carries_statistics_and_every_sequence() -> None:
    models = three_models()
    document = json.loads(results.eval_json(models))
    assert [m["model"] for m in document["models"]] == ["f16", "good", "wild"]
    assert document["rankings"]["mean_kld"] == ["good", "wild"]
    again = EvalResult.from_json(json.dumps(document["results"][2]))
    assert again == models[2].without_tokens()


def test_infinite_and_unknown_numbers_are_null_in_json() -> None:
    document = json.loads(results.eval_json([eval_result("a", [3.0] * 5)]))
    (model,) = document["models"]
    assert model["tail_index"] is None
    assert model["corpus_ppl_low"] is None
    assert model["corpus_ppl"] == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.7064, "8.706"),
        (99.9996, "100.000"),
        (123.44, "123.4"),
        (81000, "81,000"),
        (3e9, "3.0e+09"),
    ],
)
def test_perplexities_are_written_as_people_read_them(value: float, text: str) -> None:
    assert ppl(value) == text


def test_intervals_stand_behind_their_value() -> None:
    assert with_interval(Estimate(8.7064, 8.2, 9.111), ppl) == "8.706 (8.20–9.11)"
    assert with_interval(Estimate(8.7064), ppl) == "8.706"
    assert with_interval(Estimate(-0.01, -0.02, 0.001), kld) == "-0.0100 (-0.0200 to 0.00100)"
    assert (kld(0.0), kld(1.5), kld(0.000012)) == ("0", "1.50", "1.20e-05")


@given(st.floats(1e-6, 1e5), st.floats(0.01, 7))
def test_logarithmic_axes_have_a_readable_number_of_ticks(low: float, decades: float) -> None:
    high = low * 10**decades
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert len(set(ticks)) == len(ticks)
    assert low * (1 - 1e-5) <= min(ticks)
    assert max(ticks) <= high * (1 + 1e-5)


# --- the page ---


class _Structure(html.parser.HTMLParser):
    """What a browser would see: elements, their attributes, and text outside of scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def structure(text: str) -> _Structure:
    parser = _Structure()
    parser.feed(text)
    return parser


@pytest.fixture(scope="module")
def whole_page(three: EvalReport) -> str:
    measured = made_measurement(6)
    plans = [("tight", made_plan(measured)), ("roomy", made_plan(measured, 1))]
    return page(three, plans, [("made", measured)])


def test_the_page_refers_to_nothing_outside_itself(whole_page: str) -> None:
    found = structure(whole_page)
    for tag, attributes in found.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed"), tag
        assert "src" not in attributes
        assert "href" not in attributes
    policies = [a["content"] for t, a in found.elements if a.get("http-equiv")]
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'")


def test_the_page_says_what_the_terminal_says(whole_page: str, three: EvalReport) -> None:
    text = structure(whole_page).text
    for statement in (*evaluation.statements(three), *evaluation.protocol_lines(three)):
        assert statement in text
    assert "#80 · Article 26" in text
    assert "text of window 80" in text
    assert "25,000" in text


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    wild = eval_result(HOSTILE, wild_ppl(), titles=[HOSTILE] * 128)
    first = wild.sequences[0].model_copy(update={"excerpt": HOSTILE})
    wild = wild.model_copy(update={"sequences": (first, *wild.sequences[1:])})
    measured = made_measurement(1)
    renamed = measured.tensors[0].model_copy(update={"name": HOSTILE, "role": HOSTILE})
    measured = measured.model_copy(update={"tensors": (renamed, *measured.tensors[1:])})
    made = eval_report([wild], np.random.default_rng(0), n_resamples=100)
    text = page(made, [(HOSTILE, made_plan(measured))], [(HOSTILE, measured)])
    found = structure(text)
    assert [a for t, a in found.elements if "onerror" in a or t == "img"] == []
    n_blocks = sum(t == "script" and a.get("type") == "application/json" for t, a in found.elements)
    n_scripts = sum(t == "script" for t, _ in found.elements)
    assert n_scripts == n_blocks + 2  # plotly and our own
    assert "alert(1)" in found.text


def test_identical_input_gives_an_identical_page(whole_page: str, three: EvalReport) -> None:
    measured = made_measurement(6)
    plans = [("tight", made_plan(measured)), ("roomy", made_plan(measured, 1))]
    assert page(three, plans, [("made", measured)]) == whole_page


def test_a_page_of_plans_alone_needs_no_evaluation() -> None:
    measured = made_measurement(2)
    nothing = eval_report([], np.random.default_rng(0))
    text = structure(page(nothing, [("p", made_plan(measured))], [("m", measured)])).text
    assert "Where the bits go" in text
    assert "Every sequence" not in text


def test_curves_show_the_plans_of_their_own_model_only() -> None:
    measured, nothing = made_measurement(2), eval_report([], np.random.default_rng(0))
    plan = made_plan(measured)

    def sampled(sha256: str) -> dict[str, object]:
        return {"source": measured.source.model_copy(update={"sample_sha256": sha256})}

    curves = measured.model_copy(update=sampled("a"))
    one, twin = (
        page(nothing, [("p", plan.model_copy(update=sampled(s)))], [("m", curves)])
        for s in ("a", "b")
    )
    none = page(nothing, [], [("m", curves)])
    data = [
        text[text.index('id="curves-0"') :].partition("</script>")[0] for text in (one, twin, none)
    ]
    assert data[0] != data[1] == data[2]


def test_the_file_is_replaced_whole(tmp_path: Path, three: EvalReport) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    write_html(target, three)
    assert target.read_text().endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_page_is_small_and_its_title_and_first_line_say_what_it_finds(whole_page: str) -> None:
    assert len(whole_page.encode()) < 1_500_000
    assert "<title>f16, good, wild · ramgguf report</title>" in whole_page
    body = structure(whole_page).text
    verdict = "good: 100% larger than wild, KLD "
    assert body.index(verdict) < body.index("Quality against size") < body.index("Results")
    assert "Distrust mean PPL of wild" in body


def test_a_page_of_published_figures_alone_shows_them() -> None:
    board = compare_published(published.GLM_4_7_FLASH)
    text = page(eval_report([]), published=board)
    body = structure(text).text
    assert "<title>BF16, RAM v1, RAM · ramgguf report</title>" in text
    for said in ("No verdict: ", "Full inversion", "11.344", "58.2 GB", "Quality against size"):
        assert said in body, said
    assert text.count('class="plot"') == 1


@pytest.mark.parametrize("sizes", [(5_000_000_000,), (5_000_000_000,) * 3])
def test_the_size_axis_is_sane_for_one_model_and_for_equal_sizes(sizes: tuple[int, ...]) -> None:
    figures = [Aggregate(f"m{i}", n, corpus_ppl=8.0 + i) for i, n in enumerate(sizes)]
    made = board_by_size(compare_published(figures), "corpus_ppl")
    assert made is not None
    low, high = made.layout.xaxis.range
    assert (low, high) == pytest.approx((4.5, 5.5))
    shown = [x for trace in made.data for x in trace.x]
    assert all(low < x < high for x in shown)


@given(st.lists(st.floats(0, 1), max_size=20))
def test_labels_of_outliers_never_cover_each_other(places: list[float]) -> None:
    sides = label_places(places)
    named = [(x, side) for x, side in zip(places, sides, strict=True) if side is not None]
    for (x, side), (y, other) in itertools.combinations(named, 2):
        assert side != other or abs(x - y) >= 0.14
    assert not places or sides[0] is not None


# --- the chart of the terminal ---


def test_the_chart_places_files_by_size_and_quality_and_marks_the_front() -> None:
    board = compare_published(
        [
            Aggregate("small", 1_000_000_000, median_ppl=12.0),
            Aggregate("large", 4_000_000_000, median_ppl=8.0),
            Aggregate("beaten", 4_000_000_000, median_ppl=11.0),
        ]
    )
    lines = board_chart(board, 80)
    at = {
        name: next((i, line) for i, line in enumerate(lines) if name in line)
        for name in ("small", "large", "beaten")
    }
    assert at["small"][0] < at["beaten"][0] < at["large"][0]
    assert at["small"][1].index("●") < at["large"][1].index("●")
    assert "○" in at["beaten"][1]
    assert max(map(len, lines)) <= 80
    assert board_chart(compare_published([Aggregate("one", 1, median_ppl=1.0)]), 80) == []


@given(st.lists(st.tuples(st.integers(1, 10**12), st.floats(0.1, 1e6)), min_size=2, max_size=12))
@settings(max_examples=50, deadline=None)
def test_the_chart_never_overruns_and_shows_every_file(files: list[tuple[int, float]]) -> None:
    board = compare_published(
        [Aggregate(f"m{i}", n, median_ppl=v) for i, (n, v) in enumerate(files)]
    )
    lines = board_chart(board, 80)
    assert max(map(len, lines)) <= 80
    assert "●" in "".join(lines[1:])


def test_80_columns_show_the_four_figures_that_matter(three: EvalReport) -> None:
    lines = printed(three, terminal=True, width=80).splitlines()
    heading = next(line for line in lines if line.startswith("model") and "P95" in line)
    for column in ("corpus PPL", "median PPL", "P95", "P99", "PPL > 100"):
        assert column in heading
    assert any("intervals" in line for line in lines)


def test_the_verdict_comes_first(three: EvalReport) -> None:
    lines = printed(three, terminal=False, width=80).splitlines()
    assert lines[0].startswith("good: 100% larger than wild, KLD 0.")
    assert "× wild’s (" in lines[0]
    assert lines[0].endswith("better on 126 of 128 sequences; mean and median ΔNLL agree.")
    assert lines[1].startswith("Smaller, and best for their size: wild (1.00 MB, KLD ")


def test_a_partial_run_is_marked_in_every_form() -> None:
    cut = eval_result("cut", ordinary_ppl(1, n=4), n_seq=12)
    made = eval_report([cut])
    said = "cut is partial: 4 of 12 sequences"
    assert said in printed(made, terminal=False, width=80).splitlines()[0]
    assert said in structure(page(made)).text
    assert said in results.eval_markdown([cut])
    assert json.loads(results.eval_json([cut]))["verdict"][0].startswith(said)
    (row,) = csv.DictReader(io.StringIO(results.eval_csv([cut])))
    assert (row["n_sequences"], row["n_sequences_wanted"]) == ("4", "12")


# --- in a browser ---


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")


def rendered(text: str, folder: Path, *, dark: bool = False) -> str:
    """Return the DOM after the page's scripts have run; fails on any message on the console."""
    source = folder / "page.html"
    source.write_text(text, encoding="utf-8")
    command = [
        chromium(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,2000",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        source.as_uri(),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        dom, log = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = [line for line in log.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert said == []
    return dom.decode("utf-8", errors="replace")


def drawn(dom: str) -> str:
    """Return the page's drawings, without its scripts and data."""
    return re.sub(r"<script.*?</script>", "", dom, flags=re.DOTALL)


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_every_figure(whole_page: str, tmp_path: Path, dark: bool) -> None:
    dom = drawn(rendered(whole_page, tmp_path, dark=dark))
    n_places = len(re.findall(r'class="plot[ "]', dom))
    assert n_places == 7  # PPL, KLD, sequences, ΔNLL, two plans, one curve
    assert len(re.findall(r'class="plot[^"]*js-plotly-plot', dom)) == n_places
    assert dom.count('<svg class="main-svg"') >= 2 * n_places
    for axis in (
        "file size (GB)",
        "mean KLD (nats per token)",
        "sequence perplexity (logarithmic)",
        "ΔNLL (nats per token; right of 0 is worse)",
        "bits per weight",
        "NMSE (logarithmic)",
    ):
        assert f">{axis}</text>" in dom, axis
    assert len(re.findall(r'class="points?"', dom)) > 0
    assert ">#80</text>" in dom  # the outlier is named in the figure
    assert '<option value="0">token_embd.weight' in dom
    assert ">chosen by tight<" in dom
    ink = "rgb(228, 231, 235)" if dark else "rgb(28, 33, 39)"
    assert f"fill: {ink}" in dom


def test_a_browser_runs_nothing_from_hostile_names(tmp_path: Path) -> None:
    measured = made_measurement(1)
    renamed = measured.tensors[0].model_copy(update={"name": HOSTILE})
    measured = measured.model_copy(update={"tensors": (renamed, *measured.tensors[1:])})
    wild = eval_result(HOSTILE, wild_ppl(), titles=[HOSTILE] * 128)
    made = eval_report([wild], np.random.default_rng(0), n_resamples=100)
    plans = [(HOSTILE, made_plan(measured))]
    dom = rendered(page(made, plans, [(HOSTILE, measured)]), tmp_path)
    elements = structure(dom).elements
    assert [t for t, a in elements if t == "img" or "onerror" in a] == []
    assert sum(t == "script" for t, _ in elements) == dom.count("<script type=") + 2


def test_grids_are_escaped_in_html() -> None:
    text = to_html(Grid(HOSTILE, (Column(HOSTILE),), ((HOSTILE,),)))
    assert [t for t, _ in structure(text).elements if t in ("script", "img")] == []


def test_no_line_of_the_chart_is_wider_than_the_terminal_whatever_a_model_is_called() -> None:
    base, long = ordinary_ppl(1), "m" * 70
    kept: dict[str, Any] = {"reference": (long, base), "kld": np.full(128, 0.01)}
    results = [eval_result(f"{i}{long}", base * 1.01, n_bytes=10**i, **kept) for i in (6, 7)]
    made = eval_report(results)
    assert made.board is not None
    lines = board_chart(made.board, 60)
    assert any("baseline" in line for line in lines)
    assert max(map(len, lines)) <= 60
