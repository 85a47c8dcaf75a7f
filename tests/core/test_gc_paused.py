"""The collector is left as it was, and still finds what is garbage."""

import contextlib
import gc
import weakref
from collections.abc import Iterator

import pytest

from ramgguf.core.gc_paused import MANY, gc_paused


class _Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    gc.collect()
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_meanwhile_and_everything_later() -> None:
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with gc_paused():
            found = weakref.ref(_Cycle())
            many: list[list[int]] = [[] for _ in range(2 * MANY)]
            assert not collected
        assert len(many) == 2 * MANY
        assert found() is not None
    finally:
        gc.callbacks.remove(note)
    gc.collect()
    assert found() is None


@pytest.mark.parametrize(("n", "young"), [(100, True), (2 * MANY, False)])
def test_what_was_made_is_not_young_if_it_was_much(n: int, young: bool) -> None:
    with gc_paused():
        made: list[list[int]] = [[] for _ in range(n)]
    assert any(value is made for value in gc.get_objects(generation=0)) == young


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with contextlib.suppress(KeyError), gc_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() == enabled


def test_what_is_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with gc_paused():
        made: list[list[int]] = [[] for _ in range(2 * MANY)]
    assert gc.get_freeze_count() == frozen > 0
    assert made
