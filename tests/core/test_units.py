"""Sizes as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramgguf.core.errors import BudgetError
from ramgguf.core.units import (
    format_bytes,
    format_count,
    format_seconds,
    parse_budget,
    parse_seconds,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5 gb", 15 * 10**8),
        (".5MiB", 2**19),
        ("2T", 2 * 10**12),
        ("104000000", 104_000_000),
        ("123B", 123),
        ("4.5bpw", 4500 // 8),
        ("30%", 600),
    ],
)
def test_budgets_are_understood(text: str, n_bytes: int) -> None:
    assert parse_budget(text, n_weights=1000, n_bytes_source=2000) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "16 XB", "-3GB", "0", "1e9", "16GB!", "four", "0bpw"])
def test_other_texts_are_refused_by_name(text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        parse_budget(text, n_weights=1000, n_bytes_source=2000)


@pytest.mark.parametrize("text", ["4.5bpw", "30%", "much"])
def test_a_size_is_absolute(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_what_is_shown_is_within_a_percent_of_what_is_meant(n_bytes: int) -> None:
    shown = parse_size(format_bytes(n_bytes))
    assert abs(shown - n_bytes) <= 0.01 * n_bytes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_times_are_understood_and_other_texts_refused() -> None:
    told = {"90": 90, "90s": 90, "20m": 1200, "20 min": 1200, "1.5h": 5400}
    assert {text: parse_seconds(text) for text in told} == told
    for text in ("", "0", "-5m", "soon", "3d"):
        with pytest.raises(BudgetError, match=r"write 90s, 20m or 1\.5h"):
            parse_seconds(text)


def test_threads_are_counted_in_words() -> None:
    assert [format_count(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert [format_count(n, "own matrix") for n in (1, 3)] == ["1 own matrix", "3 own matrices"]
    assert format_count(1280, "token", ",") == "1,280 tokens"
    assert [format_count(n, "second", "g") for n in (1.0, 0.5)] == ["1 second", "0.5 seconds"]
