"""What passes between commands is input, too: cut short, edited by hand, of another version."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import made_results
import ramgguf
import synthetic
import test_imatrix
from ramgguf.cli.app import app
from ramgguf.errors import PlanError, RamggufError
from ramgguf.imatrix import load_imatrix
from ramgguf.report.results import eval_markdown
from ramgguf.result_files import read_material
from ramgguf.results import EvalResult, encode_float32, quantiles
from ramgguf.schema import Document, Measurement, Plan, Source
from ramgguf.sensitivities import ProbeTokens, Reading, Sensitivity, TensorSensitivity

_MEASUREMENT = synthetic.measurement(n_layers=1)
_PLAN = ramgguf.plan(_MEASUREMENT, 1_000_000, min_sqnr_db=0)


def sensitivity() -> Sensitivity:
    """Return a small one."""
    reading = Reading(name="blk.0.q", format="Q4_K", nmse=1e-3, kld=1e-4, standard_error=1e-5)
    tensor = TensorSensitivity(
        name="blk.0.q", role="attn_q", layer=0, n_weights=1024, alpha=0.1, relative_error=0.1,
        origin="measured", reading=reading,
    )  # fmt: skip
    return Sensitivity(
        ramgguf_version="0.1.0",
        source=Source(path="m.gguf", n_bytes=1, header_sha256="0", architecture="llama"),
        encoder="rtn",
        engine="b1",
        tokens=ProbeTokens(kind="random", n_sequences=1, n_tokens=64, seed=0, sha256="0"),
        tensors=(tensor, tensor.model_copy(update={"name": "blk.1.q", "reading": None})),
    )


def result() -> EvalResult:
    """Return a small one, compared with a reference."""
    found = made_results.eval_result(
        "m", [8.0, 9.0, 400.0], reference=("base", [7.0, 8.0, 9.0]), kld=[0.1, 0.2, 0.3]
    )
    tokens = encode_float32(np.full(4, 0.5, np.float32))
    sequences = [s.model_copy(update={"token_kld": tokens}) for s in found.sequences]
    update = {"sequences": tuple(sequences), "kld_quantiles": quantiles([0.1, 0.2])}
    return found.model_copy(update=update)


_RESULT = result()
_DOCUMENTS: tuple[Document, ...] = (_MEASUREMENT, _PLAN, sensitivity(), _RESULT)
_ODD: list[Any] = [None, True, -1, 0, 2**63, 1e308, "", "Q9_Z", "../../x", [], {}, [[]], "NaN"]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*path, key))
        if isinstance(item, dict | list):
            found += _places(item, (*path, key))
    return found


def _load(kind: type[Document], text: str) -> Document | None:
    """Return the document; None if it was refused in one line that names the place."""
    try:
        return kind.from_json(text, name="the file")
    except PlanError as e:
        message = str(e)
    assert message.startswith("the file")
    assert "\n" not in message
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


def _check(message: str, start: str = "") -> None:
    assert message.startswith(start)
    assert message.isprintable()


def _edited(data: st.DataObject, document: Document) -> str:
    """Return the document's JSON with one value changed, left out or repeated."""
    edited = json.loads(document.to_json())
    path = data.draw(st.sampled_from(_places(edited)))
    parent = edited
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        parent[path[-1]] = data.draw(st.sampled_from(_ODD))
    elif isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent.append(parent[path[-1]])
    return json.dumps(edited)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edited_documents_are_refused_or_sound(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(_DOCUMENTS))
    loaded = _load(type(document), _edited(data, document))
    if isinstance(loaded, Plan):
        _ = loaded.sha256(), loaded.bpw
    elif isinstance(loaded, Measurement):
        _ = loaded.n_weights, [p.sqnr_db for t in loaded.tensors for p in t.points]
    elif isinstance(loaded, Sensitivity):
        _ = loaded.sha256()
    elif isinstance(loaded, EvalResult):
        _ = loaded.kld_mean, [(s.ppl, s.kld_per_token()) for s in loaded.sequences]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_edited_results_are_refused_or_compared(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.json"
    path.write_text(_edited(data, _RESULT))
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


_IMATRIX = test_imatrix.sound_legacy()


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
