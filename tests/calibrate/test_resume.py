"""A calibration that is killed goes on, and its files are those of one that was not."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ramgguf
from interruptible import unwatched
from ramgguf.calibrate import partial
from ramgguf.calibrate.partial import partial_folder
from ramgguf.core.errors import EngineError
from ramgguf.core.progress import Silent
from ramgguf.llama import kept
from ramgguf.llama.capture import Tap
from ramgguf.llama.kept import Keeper, KeptFile, KeptHeader
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sampling import Begun, Steps, draw_together
from small_models import ARCHITECTURES, write_small_model
from tiny_models import write_tiny_model

pytest.importorskip("llama_cpp")

# A calibration that saves as often as it can, and kills itself once what it has kept is enough.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import ramgguf
from ramgguf.calibrate import partial
from ramgguf.llama.client import Engine
from ramgguf.llama.kept import KeptHeader

partial.SAVE_SECONDS = 0.0
model, output, hessian, options, path, enough = sys.argv[1:]
received = Engine.receive

def receive(self, answer):
    found = received(self, answer)
    if Path(path).exists():
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = KeptHeader.model_validate_json(file.read(size))
        if eval(enough, {"h": header}):
            os.kill(os.getpid(), signal.SIGKILL)
    return found

Engine.receive = receive
ramgguf.calibrate(model, output, hessian=hessian, **json.loads(options))
"""
ONE_GROUP, ONE_GRAM = 1 << 30, 4 * 128 * 128
DRAWS = [a for a in ARCHITECTURES if not (a.embeds or a.has_encoder)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("resume") / "tiny.gguf")


class Counted(Silent):
    """Progress that counts the tokens that were read."""

    def __init__(self) -> None:
        self.n_tokens = self.total = 0
        self._is_met = False

    def start(self, stage: str, total: int, unit: str) -> None:
        self._is_met = stage == "calibrate"
        self.total += total * self._is_met

    def advance(self, amount: int) -> None:
        self.n_tokens += amount * self._is_met


def _kill(
    model: Path, output: Path, options: Mapping[str, Any], state: Path, is_enough: str
) -> None:
    """Run the script, which is killed when what `state` holds is enough."""
    values = [model, output, output.with_suffix(".hessian"), json.dumps(options), state, is_enough]
    command = [sys.executable, "-c", SCRIPT, *map(str, values)]
    done = subprocess.run(command, env=unwatched(), timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("tokens", "n_sequences", "max_gram_bytes", "number", "is_enough"),
    [
        pytest.param("self", 130, ONE_GROUP, 1, "h.drawing is not None", id="while drawing"),
        pytest.param("random", 9, ONE_GROUP, 1, "h.n_events", id="while reading"),
        pytest.param("self,random,self", 6, ONE_GRAM, 3, "h.n_events", id="batches"),
    ],
)
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    tiny: Path,
    tmp_path: Path,
    tokens: str,
    n_sequences: int,
    max_gram_bytes: int,
    number: int,
    is_enough: str,
) -> None:
    options: dict[str, Any] = {
        "tokens": tokens, "n_sequences": n_sequences, "n_ctx": 64, "threads": 1,
        "max_gram_bytes": max_gram_bytes,
    }  # fmt: skip
    outputs = {name: tmp_path / name for name in ("whole", "killed")}
    hessians = {name: path.with_suffix(".hessian") for name, path in outputs.items()}
    every, fewer = Counted(), Counted()
    ramgguf.calibrate(tiny, outputs["whole"], hessian=hessians["whole"], progress=every, **options)
    state = tmp_path / "killed.partial" / f"pass-{number}.kept"
    _kill(tiny, outputs["killed"], options, state, is_enough)
    assert not outputs["killed"].exists()
    said: list[str] = []
    found = ramgguf.calibrate(
        tiny, outputs["killed"], hessian=hessians["killed"], progress=fewer,
        announce=said.append, **options,
    )  # fmt: skip
    assert f"pass {number} goes on from {state.parent}" in said
    assert 0 < found.n_resumed <= found.n_tokens
    assert fewer.n_tokens < every.n_tokens
    if max_gram_bytes == ONE_GROUP:  # else tokens are read again, for other Hessians
        assert fewer.n_tokens == every.n_tokens - found.n_resumed
        assert fewer.total == fewer.n_tokens  # so that the time left is that of what is left
    for paths in (outputs, hessians):
        assert paths["killed"].read_bytes() == paths["whole"].read_bytes()
    assert not state.parent.exists()


@pytest.mark.parametrize("name", [a.name for a in DRAWS])
def test_sequences_go_on_from_their_states_to_the_bit(name: str, tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", next(a for a in DRAWS if a.name == name))

    def rngs() -> list[np.random.Generator]:
        return [np.random.default_rng(k) for k in range(5)]

    tap = Tap(["blk.0.ffn_down.weight"], ["blk.0.ffn_down.weight"])
    tap.n_threads = 1
    keeper = Keeper(tmp_path / "kept", "a", tap, seconds=0.0, spare=0)
    keeper.together(64)
    with LlamaModel(path, n_ctx=64, n_threads=1) as model:

        def keep(steps: Steps) -> None:
            if steps.n_done == 7:
                keeper.step(steps)

        whole = draw_together(model, [3] * 5, 20, rngs(), tap=tap, keep=keep)
        again = Tap(["blk.0.ffn_down.weight"], ["blk.0.ffn_down.weight"])
        found = Keeper(tmp_path / "kept", "a", again, seconds=60.0, spare=0)
        header = found.restore()
        assert header is not None
        assert header.drawing is not None
        assert header.drawing.n_tokens == 35
        assert (found.together(2), found.batch()) == (64, None)
        begun = found.begun()
        assert isinstance(begun, Begun)
        rest = draw_together(model, [3] * 5, 20, rngs(), tap=again, begun=begun)
    np.testing.assert_array_equal(rest, whole)
    for weight, sums in tap.taken.sums.items():
        np.testing.assert_array_equal(again.taken.sums[weight].squares, sums.squares)
        np.testing.assert_array_equal(again.taken.sums[weight].counts, sums.counts)
    for weight, gram in tap.taken.grams.items():
        np.testing.assert_array_equal(again.taken.grams[weight], gram)


def test_what_another_run_has_kept_is_not_taken(tiny: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"n_sequences": 6, "n_ctx": 64, "threads": 1, "tokens": "random"}
    state = tmp_path / "one.partial" / "pass-1.kept"
    _kill(tiny, tmp_path / "one", options | {"seed": 1}, state, "h.n_events")
    said: list[str] = []
    for name in ("one", "other"):
        ramgguf.calibrate(tiny, tmp_path / name, seed=2, announce=said.append, **options)
    assert not any("goes on" in line for line in said)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert not state.parent.exists()


@pytest.mark.parametrize("damage", ["cut short", "longer", "no header", "a folder"])
def test_a_damaged_file_is_as_good_as_none(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    kept.write_kept(path, Tap([]).state(), KeptHeader(key="a", is_whole=True))
    assert KeptFile.opened(path, "a") is not None
    assert KeptFile.opened(path, "b") is None
    data = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        other = {"cut short": data[:-1], "longer": data + b" ", "no header": b"\xff" * 99}
        path.write_bytes(other[damage])
    assert KeptFile.opened(path, "a") is None


def test_a_save_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(tmp_path / "kept", "a", Tap([]), seconds=0.0, spare=0)
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    keeper.add_read()
    free.free = 1 << 30
    keeper.add_read()  # it is not tried again
    assert list(tmp_path.iterdir()) == []
    roomy = Keeper(tmp_path / "kept", "a", Tap([]), seconds=0.0, spare=1 << 30)
    roomy.add_read()  # what the outputs need is left to them
    assert list(tmp_path.iterdir()) == []
    free.free = 100
    with pytest.raises(EngineError, match="100 B free"):
        kept.write_kept(tmp_path / "kept", Tap([]).state(), KeptHeader(key="a", is_whole=True))


def test_saving_takes_a_twentieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=0.0, saves=[])
    monkeypatch.setattr(kept, "time", SimpleNamespace(perf_counter=lambda: now.seconds))

    def slow(*_: object, **__: object) -> None:
        now.saves.append(now.seconds)
        now.seconds += 10.0

    monkeypatch.setattr(kept, "write_kept", slow)
    keeper = Keeper(tmp_path / "kept", "a", Tap([]), seconds=60.0, spare=0)
    while now.seconds < 600:
        now.seconds += 1
        keeper.add_read()
    assert now.saves == [60.0, 270.0, 480.0]


def test_a_short_disk_keeps_nothing_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_sequences": 2, "n_ctx": 32, "threads": 1}
    ramgguf.calibrate(tiny, tmp_path / "a", hessian=tmp_path / "a.h", **options)
    usage, n_grams = shutil.disk_usage(tmp_path), (tmp_path / "a.h").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(1.5 * n_grams)))
    said: list[str] = []
    ramgguf.calibrate(
        tiny, tmp_path / "b", hessian=tmp_path / "b.h", announce=said.append, **options
    )
    assert any("a run that is killed starts over" in line for line in said)
    assert (tmp_path / "b.h").read_bytes() == (tmp_path / "a.h").read_bytes()


def test_of_two_runs_one_keeps_what_it_does(tiny: Path, tmp_path: Path) -> None:
    with partial_folder(tmp_path / "p") as one:
        assert one == tmp_path / "p"
        with partial_folder(tmp_path / "p") as other:
            assert other is None
        (one / "pass-1.kept").write_bytes(b"1")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "i.gguf.partial").write_text("a file of someone else")
    ramgguf.calibrate(tiny, tmp_path / "i.gguf", n_sequences=1, n_ctx=32, threads=1)
    assert (tmp_path / "i.gguf.partial").read_text() == "a file of someone else"


def test_what_was_kept_outlives_an_interrupt_unless_it_came_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        with suppress(KeyboardInterrupt), partial_folder(tmp_path / "p") as folder:
            assert folder is not None
            (folder / "pass-1.kept").write_bytes(b"1")
            raise KeyboardInterrupt

    interrupted()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(partial, "SAVE_SECONDS", 0.0)
    interrupted()
    monkeypatch.undo()
    interrupted()  # of a run that has gone on from earlier
    assert [path.name for path in tmp_path.rglob("*")] == ["p", "pass-1.kept"]
    with suppress(KeyboardInterrupt), partial_folder(tmp_path / "q"):
        raise KeyboardInterrupt
    assert not (tmp_path / "q").exists()
