"""Passes hold one context at a time, and none of the weights: these stay pages of the file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp")

from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import Draw, Observe, Open, TapWeights, pack_ids
from ramgguf.llama.sampling import draw_together
from ramgguf.llama.system import llama_module
from ramgguf.llama.worker import Session
from tiny_models import BOS, write_tiny_model

IDS = np.array([BOS, 40, 50, 60], np.int32)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield how many contexts were held each time that one was made."""
    llama, counts, live = llama_module(), list[int](), set[int]()
    make, free = llama.llama_init_from_model, llama.llama_free

    def made(*arguments: Any) -> Any:
        context = make(*arguments)
        live.add(context)
        counts.append(len(live))
        return context

    def freed(context: Any) -> None:
        live.discard(context)
        free(context)

    monkeypatch.setattr(llama, "llama_init_from_model", made)
    monkeypatch.setattr(llama, "llama_free", freed)
    yield counts
    assert not live


def test_one_context_is_held_while_tokens_are_drawn_and_read_under_a_tap(
    tmp_path: Path, held: list[int]
) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with open_gguf(path) as file:
        names = tuple(t.name for t in file.tensors if len(t.shape) > 1)
    session = Session(lambda _: None)
    session.open(Open(models=(str(path),), n_ctx=32, n_threads=1, safe_kernels=True, verbose=False))
    session.observer.tap(TapWeights(names=names, grams=(), head="output.weight"))
    drawn = Draw(
        tokens="self", n_ctx=32, seed=0, indices=(0, 1), name="", text=None,
        control_tokens=False, is_tapped=True,
    )  # fmt: skip
    session.draw(drawn)
    session.observer.observe(Observe(ids=pack_ids(IDS)))
    session.draw(drawn.model_copy(update={"is_tapped": False}))
    assert len(held) >= 5
    # One model's own rests while another context works; the tap's is still there for the last.
    assert max(held) <= 2
    assert held[:3] == [1, 1, 1]
    session.observer.close()
    session._stack.close()


def test_a_model_that_has_rested_reads_as_before(tmp_path: Path, held: list[int]) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with LlamaModel(path, n_ctx=32, n_threads=1, safe_kernels=True) as model:
        before = model.decode(IDS).copy()
        model.rest()
        drawn = draw_together(model, [BOS], 4, [np.random.default_rng(0)])
        np.testing.assert_array_equal(model.decode(IDS), before)  # from position 0
        np.testing.assert_array_equal(
            drawn, draw_together(model, [BOS], 4, [np.random.default_rng(0)])
        )
    assert held == [1, 1, 1, 2]


def _mapped(path: Path) -> tuple[int, int]:
    """Return the bytes of the file that are mapped, and those of them that are copies."""
    n_mapped, n_copied, is_its = 0, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            is_its = line.endswith(str(path))
        elif is_its and name == "Size:":
            n_mapped += 1024 * int(rest[0])
        elif is_its and name == "Anonymous:":
            n_copied += 1024 * int(rest[0])
    return n_mapped, n_copied


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_weights_under_a_tap_are_not_memory_of_the_process(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "deep.gguf", n_layers=300)
    size = path.stat().st_size
    assert size > 45e6
    with open_gguf(path) as file:
        tap = Tap([t.name for t in file.tensors if len(t.shape) > 1])
    with LlamaModel(
        path, n_ctx=16, n_threads=1, safe_kernels=True, eval_callback=tap.callback
    ) as model:
        model.decode(IDS)
        tap.check()
        n_mapped, n_copied = _mapped(path)
    assert len(tap.taken.sums) > 2000
    assert n_mapped > 0.9 * size  # a loader that copies weights does not keep the file mapped
    assert n_copied == 0
