"""What notebooks show: the object's own numbers, and nothing that a name could smuggle in."""

import functools
import html.parser
import math
from collections import Counter

import numpy as np
import pytest

import ramgguf
from made_plans import made_measurement, made_plan
from made_results import eval_result, ordinary_ppl
from ramgguf.core.drawing import Drawn, drawn_by
from ramgguf.core.units import format_bytes
from ramgguf.deploy.result import Answer, CheckResult, Speed, Spread
from ramgguf.evaluate.comparison import compare_results
from ramgguf.evaluate.evaluation import Evaluation
from ramgguf.evaluate.result import EvalResult
from ramgguf.plan.result import MemoryBudget, MemoryUse
from ramgguf.sensitivity.result import ProbeTokens, Sensitivity, TensorSensitivity

HOSTILE = '</style></table><script>alert(1)</script><img src=x onerror="alert(2)">&amp;<!--'
TABLE_TAGS = {"div", "style", "p", "b", "table", "caption", "thead", "tbody", "tr", "th", "td"}
LIST_TAGS = {"br", "small", "ul", "li"}
PICTURE_TAGS = {"svg", "g", "rect", "text", "line", "polygon", "polyline", "circle", "title"}
TAGS = TABLE_TAGS | LIST_TAGS | PICTURE_TAGS
MEASURED = made_measurement(2)


class Shown(html.parser.HTMLParser):
    """What a browser would make of it: tables as rows of cells, and all other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.tags: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self._in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        elif tag == "br":
            self.handle_data(" (")

    def handle_endtag(self, tag: str) -> None:
        self.tags[tag] -= tag not in ("br",)
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def shown(value: Drawn) -> Shown:
    text = value._repr_html_()
    assert text is not None
    found = Shown(text)
    assert set(found.tags) <= TAGS
    assert found.attributes.isdisjoint({"src", "href", "style", "onerror", "onload", "onclick"})
    assert all(n == 0 for tag, n in found.tags.items() if tag != "br")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    return found


def made_sensitivity(text: str | None = None) -> Sensitivity:
    tensors = tuple(
        TensorSensitivity(
            name=t.name,
            role=t.role,
            layer=t.layer,
            n_weights=t.n_weights,
            alpha=0.5 + k,
            relative_error=0.1,
            origin="measured",
        )
        for k, t in enumerate(MEASURED.tensors)
        if not t.kept
    )
    tokens = ProbeTokens(
        kind="text" if text else "self", n_sequences=1, n_tokens=512, seed=3, sha256="x", text=text
    )
    return Sensitivity(
        ramgguf_version="0", source=MEASURED.source, encoder="rtn", engine="b", tokens=tokens,
        tensors=tensors, seconds=75.0,
    )  # fmt: skip


def made_check(path: str = "m.gguf", said: str = "Blue.") -> CheckResult:
    spread = Spread.of([10.0, 12.5, 11.0])
    return CheckResult(
        ramgguf_version="0",
        path=path,
        n_bytes=104_000_000,
        name=None,
        n_ctx=4096,
        type_k="F16",
        type_v="F16",
        n_threads=2,
        limit=1_000_000_000,
        limit_source="--memory",
        limit_method="a test",
        planned=MemoryUse(weights=90_000_000, cache=20_000_000),
        planned_by="llama.cpp",
        load_seconds=1.5,
        peak_bytes=250_000_000,
        speed=Speed(
            n_prompt=512, prompt=spread, generation=spread, first_token_seconds=spread,
            filling=9.0, generation_full=8.0,
        ),
        answers=(Answer(prompt="Why?", text=said, n_tokens=3, ended=True, signs=()),),
        known_ppl=15.6,
    )  # fmt: skip


def made_evaluation(label: str = "good") -> list[EvalResult]:
    base = ordinary_ppl(1, 16)
    reference = ("f16", base)
    return [
        eval_result("f16", base),
        eval_result(label, base * 1.02, reference=reference, kld=np.full(16, 0.0123)),
    ]


def test_a_plan_shows_its_roles_formats_and_sizes() -> None:
    plan = made_plan(MEASURED)
    found = shown(plan)
    (table,) = found.tables
    assert table[0] == ["role", "formats (tensors)", "bytes", "bpw", "cost"]
    assert len(table) - 1 == len({a.role for a in plan.assignments})
    for role, formats, n_bytes, bpw, cost in table[1:]:
        members = [a for a in plan.assignments if a.role == role]
        total = sum(a.n_bytes for a in members)
        assert n_bytes == format_bytes(total)
        assert float(bpw) == pytest.approx(
            8 * total / sum(a.n_weights for a in members), abs=0.0051
        )
        told = dict(part.split(" ×") for part in formats.split("  "))
        assert {f: int(n) for f, n in told.items()} == Counter(a.format for a in members)
        share = sum(a.cost for a in members) / plan.total_cost
        assert float(cost.removesuffix("%")) == pytest.approx(100 * share, abs=0.051)
    assert f"file {plan.n_bytes:,} bytes" in found.text
    assert f"{plan.bpw:.3f} bpw" in found.text


def test_a_plan_for_memory_shows_where_the_memory_goes() -> None:
    use = MemoryUse(weights=50_000_000, cache=20_000_000, compute=5_000_000, overhead=1_000_000)
    memory = MemoryBudget(
        limit=100_000_000, limit_source="--memory", n_ctx=4096, n_seq=1, type_k="F16",
        type_v="F16", method="llama.cpp", ram=use,
    )  # fmt: skip
    plan = made_plan(MEASURED).model_copy(update={"memory": memory})
    _, table = shown(plan).tables
    sizes = ["50.0 MB", "20.0 MB", "5.00 MB", "1.00 MB", "76.0 MB", "100 MB", "24.0 MB"]
    assert table[1] == ["RAM", *sizes]


def test_a_measurement_shows_what_each_format_would_cost_and_lose() -> None:
    (table,) = shown(MEASURED).tables
    assert [row[0] for row in table[1:]] == list(MEASURED.formats)
    for name, n_tensors, n_bytes, _, median, lowest in table[1:]:
        points = [p for t in MEASURED.tensors for p in t.points if p.format == name and not t.kept]
        assert int(n_tensors) == len(points)
        assert n_bytes == format_bytes(sum(p.n_bytes for p in points))
        sqnr = sorted(p.sqnr_db for p in points)
        if math.isfinite(sqnr[0]):
            assert float(lowest) == pytest.approx(sqnr[0], abs=0.051)
            assert sqnr[0] <= float(median) + 0.051 <= sqnr[-1] + 0.102
        else:
            assert (median, lowest) == ("∞", "∞")


def test_a_frontier_shows_its_table_and_its_picture() -> None:
    frontier = ramgguf.curve(MEASURED)
    found = shown(frontier)
    (table,) = found.tables
    assert table[1][0] == format_bytes(frontier.start_bytes)
    assert table[-1][0] == format_bytes(frontier.end_bytes)
    assert table[1][2] == f"{frontier.start_cost:.4g}"
    assert "svg" in found.tags
    assert f"{len(frontier.steps) + 1} optimal plans" in found.text


def test_sensitivities_show_each_role() -> None:
    sensitivity = made_sensitivity()
    found = shown(sensitivity)
    (table,) = found.tables
    for role, n, median, least, most, error, _ in table[1:]:
        alpha = [t.alpha for t in sensitivity.tensors if t.role == role]
        assert int(n) == len(alpha)
        assert (least, most) == (f"{min(alpha):.3g}", f"{max(alpha):.3g}")
        assert median == f"{np.median(alpha):.3g}"
        assert error == "10%"
    assert "512 tokens" in found.text


def test_a_check_shows_its_verdict_and_what_was_measured() -> None:
    found = shown(made_check())
    measured, answers = found.tables
    rows = {row[0]: row[1:] for row in measured}
    assert rows["memory at its peak, context filled"][0] == "250 MB"
    assert rows["margin"][:2] == ["750 MB", "75.0%"]
    assert rows["generation, tokens/s"] == ["11.0", "10.0–12.5", "3"]
    assert answers[1] == ["Why?", "Blue."]
    assert "PASS: m.gguf" in found.text


def test_a_result_and_an_evaluation_show_perplexity_and_divergence() -> None:
    results = made_evaluation()
    nll = sum(s.nll_sum for s in results[0].sequences) / results[0].n_scored
    (table,) = shown(results[0]).tables
    cells = dict(zip(*table, strict=True))
    assert cells["model"] == "f16"
    assert cells["size"] == format_bytes(results[0].model.n_bytes)
    assert float(cells["corpus PPL"].split()[0]) == pytest.approx(math.exp(nll), abs=0.0051)
    found = shown(Evaluation(tuple(results), ("third.gguf: crashed",)))
    perplexity, against, rankings = found.tables
    assert [row[0] for row in perplexity[1:]] == ["f16", "good"]
    assert against[1][against[0].index("mean KLD")].split()[0] == "0.0123"
    assert rankings[0] == ["ranked by", "best first"]
    assert "third.gguf: crashed" in found.text


def test_a_comparison_shows_models_and_rankings() -> None:
    results = made_evaluation()
    board = compare_results(results, np.random.default_rng(0), n_resamples=200)
    models, rankings = shown(board).tables
    assert [row[0] for row in models[1:]] == [row.label for row in board.rows]
    assert rankings[1][1].startswith(board.rankings[0].order[0])


KINDS = ["plan", "measurement", "frontier", "sensitivity", "check", "result", "evaluation", "board"]


@functools.cache
def hostile_values() -> dict[str, Drawn]:
    source = MEASURED.source.model_copy(update={"name": HOSTILE})
    tensors = tuple(
        t.model_copy(
            update={
                "name": HOSTILE + t.name,
                "role": HOSTILE + t.role,
            }
        )
        for t in MEASURED.tensors
    )
    measured = MEASURED.model_copy(update={"source": source, "tensors": tensors})
    plan = made_plan(measured).model_copy(update={"source": source, "notes": (HOSTILE,)})
    plain = ramgguf.curve(MEASURED)
    frontier = plain.model_copy(update={"source": source, "notes": (HOSTILE,)})
    sensitivity = made_sensitivity(HOSTILE).model_copy(update={"source": source})
    results = made_evaluation(HOSTILE)
    board = compare_results(results, np.random.default_rng(0), n_resamples=200)
    return {
        "plan": plan,
        "measurement": measured,
        "frontier": frontier,
        "sensitivity": sensitivity,
        "check": made_check(HOSTILE, HOSTILE),
        "result": results[1],
        "evaluation": Evaluation(tuple(results), (HOSTILE,)),
        "board": board,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_text_and_nothing_else(kind: str) -> None:
    found = shown(hostile_values()[kind])
    # A label is the last part of a path.
    assert HOSTILE.rpartition("/")[2] in " ".join(found.text.split())
    assert "script" not in found.tags


def test_where_nothing_draws_the_notebook_falls_back() -> None:
    plan = made_plan(MEASURED)
    try:
        drawn_by(lambda _: None)
        assert plan._repr_html_() is None
    finally:
        drawn_by(ramgguf._draw)
    assert Drawn()._repr_html_() is None
    assert plan._repr_html_() is not None
