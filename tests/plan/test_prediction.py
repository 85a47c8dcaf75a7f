"""The KLD that is predicted of plans, against what was measured of files of two families."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from predictions import covered, fitted
from ramgguf.plan.prediction import SHIPPED, interval, predicted_kld
from ramgguf.plan.result import Assignment

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "predictions.jsonl"
WIDEST = 8.0  # upper end ÷ lower end: an interval that is wider says nothing


def _rows() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["architecture"], []).append(row)
    return found


def _assignment(name: str, nmse: float) -> Assignment:
    return Assignment(
        name=name,
        role="ffn_up",
        source_format="F16",
        format="Q4_K",
        n_weights=256,
        n_bytes=144,
        nmse=nmse,
        cost=1.0,
    )


def test_the_stored_plans_are_of_two_families_and_of_many_sizes() -> None:
    families = _rows()
    assert len(families) == 2
    for rows in families.values():
        assert len(rows) >= 10
        assert max(r["bpw"] for r in rows) > 6.5
        assert max(r["kld"] for r in rows) > 10 * min(r["kld"] for r in rows)


def test_intervals_cover_nine_of_ten_measured_klds_in_each_family() -> None:
    families = _rows()
    assert sum(map(len, families.values())) >= 20
    for rows in families.values():
        assert sum(covered(rows, SHIPPED)) >= 0.9 * len(rows)


def test_a_calibration_on_one_family_covers_the_other() -> None:
    families = _rows()
    for family, rows in families.items():
        (others,) = (r for name, r in families.items() if name != family)
        assert sum(covered(rows, fitted(others))) >= 0.9 * len(rows)


def test_intervals_are_narrow_enough_to_choose_by() -> None:
    for rows in _rows().values():
        for row in rows:
            found = interval(row["alpha_nmse"], row["alpha_quantized"], row["alpha_error"])
            assert found is not None
            assert 1 < found.high / found.low < WIDEST


def test_the_prediction_adds_up_the_tensors_that_lose_something() -> None:
    tensors = [_assignment("a", 0.01), _assignment("b", 0.02), _assignment("c", 0.0)]
    alpha, late = {"a": 2.0, "b": 3.0, "c": 5.0}, {"a": 1.0, "b": 0.5, "c": 1.0}
    found = predicted_kld(tensors, alpha, {"a": 0.1, "b": 0.3}, late, "search")
    assert found is not None
    assert found == interval(2 * 0.01 + 1.5 * 0.02, 2.0 + 1.5, 0.1 * 2 * 0.01 + 0.3 * 1.5 * 0.02)
    expected = 0.05 + 3.5 * SHIPPED.kernel_nmse
    assert found.kld == pytest.approx(expected)
    assert math.sqrt(found.low * found.high) == pytest.approx(expected)
    certain = predicted_kld(tensors, alpha, {}, late, "search")
    assert certain is not None
    assert certain.low > found.low
    assert certain.high < found.high


def test_nothing_is_predicted_of_what_was_not_compared() -> None:
    lossy, alpha, late = [_assignment("a", 0.01)], {"a": 2.0}, {"a": 1.0}
    assert predicted_kld(lossy, alpha, {}, late, "search") is not None
    assert predicted_kld([_assignment("a", 0.0)], alpha, {}, late, "search") is None
    assert predicted_kld(lossy, alpha, {}, late, "gptq") is None
    assert predicted_kld(lossy, alpha, {}, {}, "search") is None  # an older file's α
