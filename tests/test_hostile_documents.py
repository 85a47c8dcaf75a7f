"""Plans and measurements are input, too: cut short, edited by hand, of another version or model."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ramgguf
import synthetic
from ramgguf.errors import PlanError
from ramgguf.schema import Document, Measurement, Plan

_MEASUREMENT = synthetic.measurement(n_layers=1)
_PLAN = ramgguf.plan(_MEASUREMENT, 1_000_000, min_sqnr_db=0)
_DOCUMENTS: tuple[Document, ...] = (_MEASUREMENT, _PLAN)
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


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_edited_documents_are_refused_or_sound(data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(_DOCUMENTS))
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
    loaded = _load(type(document), json.dumps(edited))
    if isinstance(loaded, Plan):
        _ = loaded.sha256(), loaded.bpw
    elif isinstance(loaded, Measurement):
        _ = loaded.n_weights, [p.sqnr_db for t in loaded.tensors for p in t.points]


def test_deep_and_huge_values_are_refused() -> None:
    for text in ("[" * 100_000, '{"schema": ' + "[" * 5000 + "]" * 5000 + "}", "1" * 10_000, "\0"):
        assert _load(Plan, text) is None
