"""What passes between commands is input, too: cut short, edited by hand, of another version."""

import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import imatrix_samples
import made_documents
import made_results
import ramgguf
from ramgguf.cli.app import app
from ramgguf.core.documents import Document
from ramgguf.core.errors import PlanError, RamggufError
from ramgguf.deploy.result import CheckResult
from ramgguf.evaluate.journal import Journal
from ramgguf.evaluate.result import EvalResult
from ramgguf.evaluate.result_files import read_material
from ramgguf.measure.result import Measurement
from ramgguf.plan.frontier_result import Frontier
from ramgguf.plan.recipes import Recipe, diff, pins_for
from ramgguf.plan.result import Plan
from ramgguf.quants.imatrix import load_imatrix
from ramgguf.refine.journal import RefineJournal
from ramgguf.report.check import print_check, print_ratios
from ramgguf.report.choices import print_difference, print_explanation, print_recipe
from ramgguf.report.frontier import curve_svg, print_curve
from ramgguf.report.page import write_html
from ramgguf.report.plans import print_plan
from ramgguf.report.results import eval_markdown, print_eval, report_of
from ramgguf.report.sensitivity import print_sensitivity
from ramgguf.report.terminal import PlainConsole
from ramgguf.sensitivity.journal import Journal as SensitivityJournal
from ramgguf.sensitivity.result import Sensitivity

_DOCUMENTS = made_documents.documents()
_RESULT = made_documents.result()
_JOURNALS = made_documents.journals()
_OPENED: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "eval": lambda path: Journal(path, resume=True),
    "sensitivity": SensitivityJournal,
    "refine": RefineJournal,
}


def _check(message: str, start: str = "") -> None:
    assert message.startswith(start)
    assert message.isprintable()


def _load(kind: type[Document], text: str) -> Document | None:
    """Return the document; None if it was refused in one line that names the place."""
    try:
        return kind.from_json(text, name="the file")
    except PlanError as e:
        message = str(e)
    _check(message, "the file")
    return None


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda d: d.KIND)
def test_documents_cut_short_are_refused(document: Document) -> None:
    text = document.to_json()
    for n in range(0, len(text) - 2, max(1, len(text) // 200)):
        assert _load(type(document), text[:n]) is None
    assert _load(type(document), text) == document


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda d: d.KIND)
def test_other_versions_and_kinds_are_refused_by_name(document: Document) -> None:
    text = document.to_json()
    schema = f"ramgguf.{document.KIND}/{document.VERSION}"
    for other in (f"ramgguf.{document.KIND}/{document.VERSION + 1}", "ramgguf.other/1", ""):
        with pytest.raises(PlanError, match=f"schema is '{other}', expected '{schema}'"):
            type(document).from_json(text.replace(schema, other))


def _edited(data: st.DataObject, text: str) -> str:
    return made_documents.edited(text, lambda n: data.draw(st.integers(0, n - 1)))


def _use(document: Document, console: Console) -> None:
    """Do with the document what the commands do that read it."""
    plan = made_documents.plan()
    measurement = made_documents.measurement()
    match document:
        case Measurement():
            print_plan(ramgguf.plan(document, "50%", min_sqnr_db=0), console, verbose=True)
        case Plan():
            print_plan(document, console, verbose=True)
            print_explanation(ramgguf.explain(document, measurement), None, console)
        case Sensitivity():
            print_sensitivity(document, console, verbose=True)
            ramgguf.plan(measurement, "50%", sensitivity=document, min_sqnr_db=0)
        case Recipe():
            print_recipe(document, console)
            difference = diff(document, Recipe.of_plan(plan, "p"))
            print_difference(difference, console, verbose=True)
            pins_for(document, measurement)
        case Frontier():
            planned = ramgguf.plan(document, "50%")
            print_curve(document, [planned], console)
            curve_svg(document, [planned])
        case EvalResult():
            print_eval([document], console)
            eval_markdown([document])
        case CheckResult():
            print_check(document, console, verbose=True)
            print_ratios(document, made_documents.check(), console)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edited_documents_are_refused_or_of_use(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(_DOCUMENTS))
    loaded = _load(type(document), _edited(data, document.to_json()))
    shown = io.StringIO()
    if loaded is not None:
        try:
            _use(loaded, PlainConsole(file=shown))
        except RamggufError as e:
            _check(str(e))
    assert "\x1b" not in shown.getvalue()


_FRONTIER = made_documents.frontier()
_GROUP = _FRONTIER.groups[0]
_BROKEN: dict[str, dict[str, object]] = {
    "a tensor too few": {"tensors": _FRONTIER.tensors[1:]},
    "a group too few": {"groups": _FRONTIER.groups[1:]},
    "a group twice": {"groups": (*_FRONTIER.groups, _GROUP)},
    "a group without choice": {"groups": (_GROUP.model_copy(update={"choices": ()}),)},
    "a group of others": {"groups": (_GROUP.model_copy(update={"members": (0, 1)}),)},
    "a step too few": {"steps": _FRONTIER.steps[1:]},
    "a step twice": {"steps": (_FRONTIER.steps[0], *_FRONTIER.steps)},
    "a step of no group": {"steps": (_FRONTIER.steps[0].model_copy(update={"group": 99}),)},
    "a step to no choice": {"steps": (_FRONTIER.steps[0].model_copy(update={"choice": 99}),)},
    "a knee at no step": {"knees": (len(_FRONTIER.steps),)},
}


@pytest.mark.parametrize("what", _BROKEN)
def test_a_frontier_that_does_not_fit_together_is_refused(what: str) -> None:
    text = _FRONTIER.model_copy(update=_BROKEN[what]).to_json()
    assert _load(Frontier, text) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nmse", -0.5),
        ("nmse", 1e101),
        ("max_error", "0x1"),
        ("max_error", None),
        ("n_bytes", 0),
        ("plain_nmse", -1.0),
        ("surprise", 1),
    ],
)
def test_points_that_cannot_be_are_refused(field: str, value: object) -> None:
    edited = json.loads(made_documents.measurement().to_json())
    edited["tensors"][0]["points"][1][field] = value
    with pytest.raises(PlanError, match=rf"the file: tensors\.0\.points\.1\.{field}: "):
        Measurement.from_json(json.dumps(edited), name="the file")


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda d: d.KIND)
def test_documents_without_tensors_are_refused(document: Document) -> None:
    edited = json.loads(document.to_json())
    for place in {"tensors", "assignments"} & set(edited):
        edited[place] = []
        assert _load(type(document), json.dumps(edited)) is None


def test_extreme_numbers_are_refused_or_of_use() -> None:
    for place, value in (("n_scored", 2**63), ("delta_p_sum", 1e308), ("token_kld", "")):
        edited = json.loads(_RESULT.to_json())
        edited["sequences"][1][place] = value
        assert _load(EvalResult, json.dumps(edited)) is None
    choice = _GROUP.choices[0].model_copy(update={"cost": 1e99})
    costly = _GROUP.model_copy(update={"choices": (choice, *_GROUP.choices[1:])})
    update = {"groups": (costly, *_FRONTIER.groups[1:])}
    loaded = _load(Frontier, _FRONTIER.model_copy(update=update).to_json())
    assert loaded is not None
    _use(loaded, PlainConsole(file=io.StringIO()))


def test_a_perplexity_beyond_all_numbers_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    sequences = [s.model_copy(update={"nll_sum": 1e9}) for s in _RESULT.sequences]
    endless = _RESULT.model_copy(update={"sequences": (sequences[0], *_RESULT.sequences[1:])})
    for result in (endless, _RESULT.model_copy(update={"sequences": tuple(sequences)})):
        loaded = _load(EvalResult, result.to_json())
        assert isinstance(loaded, EvalResult)
        assert loaded.sequences[0].ppl == np.inf
        _use(loaded, PlainConsole(file=io.StringIO()))
        write_html(tmp_path / "page.html", report_of([loaded]))


def test_messages_quote_nothing_that_controls_a_terminal() -> None:
    for key in ("a\nb", "\x1b[2J", "\x9b", "\u2028", "\ud800"):
        text = json.dumps({"schema": "ramgguf.plan/1", key: 1})
        with pytest.raises(PlanError) as caught:
            Plan.from_json(text, name="the file")
        _check(str(caught.value), "the file: ")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edited_journals_are_refused_in_one_line_or_gone_on_with(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = data.draw(st.sampled_from(list(_JOURNALS)))
    lines = [_edited(data, x) if data.draw(st.booleans()) else x for x in _JOURNALS[kind]]
    content = "\n".join(data.draw(st.lists(st.sampled_from(lines)))).encode() + b"\n"
    path = tmp_path_factory.getbasetemp() / "journal"
    path.write_bytes(content[: len(content) - data.draw(st.integers(0, 3))])
    before = path.read_bytes()
    try:
        with _OPENED[kind](path) as found:
            if isinstance(found, Journal):
                _ = found.results()
    except RamggufError as e:
        _check(str(e), f"{path}: ")
    assert path.read_bytes() == before  # nothing is dropped before something is added


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_edited_results_are_refused_or_compared(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.json"
    path.write_text(_edited(data, _RESULT.to_json()))
    other = made_results.eval_result(
        "n", [8.5, 9.5, 300.0], reference=("base", [7.0, 8.0, 9.0]), kld=[0.2, 0.1, 0.2]
    )
    try:
        eval_markdown([*read_material([path]).results, other])
    except RamggufError as e:
        _check(str(e))


def test_deep_and_huge_values_are_refused() -> None:
    for text in ("[" * 100_000, '{"schema": ' + "[" * 5000 + "]" * 5000 + "}", "1" * 10_000, "\0"):
        assert _load(Plan, text) is None


_NESTED = '{"schema": ' + "[" * 100_000
_MATERIAL: dict[str, bytes] = {
    "nested.json": _NESTED.encode(),
    "list.json": b"[]",
    "number.json": b"1",
    "kind.json": b'{"schema": {"a": 1}}',
    "results.json": b'{"schema": "ramgguf.evaluation/1", "results": [1, null, []]}',
    "binary.json": b"\xff\xfe",
    "empty.jsonl": b"",
    "binary.jsonl": b"\x00\xff\n",
    "nested.jsonl": _NESTED.encode() + b"\n",
    "sequence.jsonl": b'{"record":"sequence","run":"x","index":0,"seconds":1,"decode_seconds":1}\n',
    "failure.jsonl": b'{"record":"failure","run":"x","message":"m"}\n',
    "empty.csv": b"",
    "field.csv": b"model,mean_ppl\n" + b"x" * 200_000 + b",1\n",
    "short.csv": b"mean_ppl,model\n1\n2\n",
    "twice.csv": b"model,mean_ppl\na,1\na,2\n",
    "number.csv": b"model,mean_ppl\na,nan\n",
    "overflow.csv": b"model,n_bytes\na,1e999\n",
    "zero.csv": b"model,mean_ppl\n\x00,1\nb,2\n",
}


@pytest.mark.parametrize("name", _MATERIAL)
def test_what_is_no_result_is_refused_or_shown(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(_MATERIAL[name])
    done = CliRunner().invoke(app, ["compare", str(path)])
    if done.exception is not None:
        assert isinstance(done.exception, RamggufError), done.exception
        assert str(path) in str(done.exception) or "label" in str(done.exception)
        assert str(done.exception).isprintable()


_IMATRIX = imatrix_samples.sound_legacy()


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, len(_IMATRIX) - 1),
    value=st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0x7FC00000]),
    n_bytes=st.integers(1, 4),
)
def test_edited_importance_matrices_are_refused_or_sound(
    at: int, value: int, n_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(_IMATRIX)
    data[at : at + n_bytes] = value.to_bytes(4, "little")[:n_bytes]
    path = tmp_path_factory.getbasetemp() / "edited.dat"
    path.write_bytes(data)
    try:
        imatrix = load_imatrix(path)
    except RamggufError as e:
        _check(str(e), f"{path}: ")
        return
    for entry in imatrix.entries.values():
        assert np.isfinite(entry.values).all()
        assert (entry.values >= 0).all()
    assert len(imatrix.source.sha256) == 64
