"""α by passes that begin at later layers is α by whole passes, whatever happens on the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")

import small_models
from ramgguf.cluster import session_cache
from ramgguf.cluster.remote_runner import RemoteRunner
from ramgguf.cluster.runners import open_runner
from ramgguf.core.progress import Silent
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.tokens import TokenRequest
from ramgguf.sensitivity.alpha import measure_alpha
from ramgguf.sensitivity.result import Sensitivity
from ramgguf.sensitivity.starts import Depth
from small_models import ARCHITECTURES, write_small_model
from tiny_models import write_tiny_model

N_LAYERS = 6
ALL = 7 * N_LAYERS + 2


def measured(
    model: Path, folder: Path, stand_in: str | None = None, seconds: float | None = None
) -> tuple[Sensitivity, list[str]]:
    """Return α and what was announced."""
    request = TokenRequest(
        encoder="rtn", tokens="random", n_sequences=None if seconds else 2, n_ctx=48,
        stand_in=stand_in, seconds=seconds or 1200.0,
    )  # fmt: skip
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    with open_gguf(model) as file:
        found = measure_alpha(
            file,
            request,
            open_runner(file, request, scratch=folder, threads=1),
            journal_path=folder / "journal",
            progress=Silent(),
            announce=said.append,
        )
    return found, said


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder / "deep.gguf", weight_type="F16", n_layers=N_LAYERS)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make loading cost nothing, so that passes begin at many layers; return the starts asked."""
    asked: list[int] = []
    compare = RemoteRunner._compare

    def noted(self: RemoteRunner, wanted: ForwardRequest) -> object:
        asked.append(wanted.start)
        return compare(self, wanted)

    monkeypatch.setattr(RemoteRunner, "_compare", noted)
    monkeypatch.setattr(RemoteRunner, "reload_seconds", 0.0)
    return asked


def _small_model(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, n_layers: int = N_LAYERS
) -> Path:
    """Write a small model of the architecture with so many layers."""
    monkeypatch.setattr(small_models, "N_LAYERS", n_layers)
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    return write_small_model(folder / f"{name}.gguf", architecture, tokenizer=True)


def _whole(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, stand_in: str | None = None
) -> Sensitivity:
    with monkeypatch.context() as patch:
        patch.setattr(RemoteRunner, "reload_seconds", None)
        return measured(model, folder, stand_in)[0]


@pytest.mark.parametrize("stand_in", [None, "Q8_0"])
def test_alpha_is_the_same_wherever_passes_begin(
    model: Path,
    tmp_path: Path,
    starts: list[int],
    monkeypatch: pytest.MonkeyPatch,
    stand_in: str | None,
) -> None:
    whole = _whole(model, tmp_path / "whole", monkeypatch, stand_in)
    assert set(starts) == {0}
    found, said = measured(model, tmp_path / "later", stand_in)
    assert len(set(starts)) >= 4
    assert found.tensors == whole.tensors
    assert found.tokens == whole.tokens
    assert not any("first layer" in line for line in said)
    assert all(t.origin == "measured" for t in found.tensors)


def test_a_model_whose_layers_depend_on_the_first_is_read_by_whole_passes(
    tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _small_model("gpt2", tmp_path, monkeypatch)  # positions are added to the input
    whole = _whole(model, tmp_path / "whole", monkeypatch)
    found, said = measured(model, tmp_path / "later")
    assert max(starts) > 0
    assert found.tensors == whole.tensors
    refused = [line for line in said if "first layer" in line]
    assert len(refused) == 1
    assert "computes other logits" in refused[0]


def test_a_model_with_a_pattern_of_layers_begins_at_its_periods_and_is_not_refused(
    tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _small_model("gemma3", tmp_path, monkeypatch, n_layers=14)
    whole = _whole(model, tmp_path / "whole", monkeypatch)
    found, said = measured(model, tmp_path / "later")
    assert set(starts) == {0, 6, 12}
    assert found.tensors == whole.tensors
    assert not any("first layer" in line for line in said)


def test_a_pass_is_reckoned_by_what_a_token_is_multiplied_with(tmp_path: Path) -> None:
    moe = next(a for a in ARCHITECTURES if a.name == "qwen3moe")  # two of four experts
    with open_gguf(write_small_model(tmp_path / "moe.gguf", moe)) as file:
        depth = Depth.of(file)
        n = {t.name: t.n_weights for t in file.tensors}
        head, embedding = file.tensor("output.weight"), file.tensor("token_embd.weight")
        assert (depth.first(head), depth.first(embedding)) == (1, 0)
    layer = sum(n[f"blk.1.attn_{part}.weight"] for part in ("q", "k", "v", "output"))
    layer += sum(n[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")) // 2
    share = (layer + n["output.weight"]) / (2 * layer + n["output.weight"])
    assert depth.shares == pytest.approx((1.0, share))


def test_after_a_refusal_all_passes_of_a_run_with_a_clock_are_whole(
    tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _small_model("gpt2", tmp_path, monkeypatch)
    found, said = measured(model, tmp_path / "run", seconds=600.0)
    assert all(t.origin == "measured" for t in found.tensors)
    assert sum(start > 0 for start in starts) == 1
    assert len([line for line in said if "first layer" in line]) == 1


def test_a_run_killed_while_passes_begin_at_a_later_layer_goes_on_to_the_same_alpha(
    model: Path, tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _whole(model, tmp_path / "whole", monkeypatch)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from test_starts import measured\n"
        "from ramgguf.cluster.remote_runner import RemoteRunner\n"
        "from ramgguf.sensitivity import journal as j\n"
        "RemoteRunner.reload_seconds = 0.0\n"
        "add = j.Journal.add\n"
        "def slow(self, reading):\n"
        "    add(self, reading)\n"
        "    time.sleep(0.1)\n"
        "j.Journal.add = slow\n"
        "measured(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(p) for p in (here, *here.parents[:2])),
    }
    run = tmp_path / "run"
    child = subprocess.Popen([sys.executable, str(script), str(model), str(run)], env=environment)
    journal = run / "journal"
    try:
        for _ in range(600):
            if journal.exists() and journal.read_bytes().count(b"\n") >= ALL // 2:
                break
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert ALL // 2 <= journal.read_bytes().count(b"\n") < ALL
    starts.clear()
    found, _ = measured(model, run)
    assert found.tensors == whole.tensors
    *readings, last = starts
    assert readings == sorted(readings)
    assert max(readings) > 0
    assert last == 0  # a whole pass, which shows that the copy is as before


def test_where_llama_cpp_crashes_in_a_pass_that_begins_later_all_others_are_whole(
    model: Path, tmp_path: Path, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _whole(model, tmp_path / "whole", monkeypatch)
    worker = tmp_path / "crashes_later.py"
    worker.write_text(
        "import os, signal\n"
        "from ramgguf.llama import runner_worker\n"
        "compared = runner_worker._compared\n"
        "def crashing(runner, request):\n"
        "    if request.start:\n"
        "        os.kill(os.getpid(), signal.SIGABRT)\n"
        "    return compared(runner, request)\n"
        "runner_worker._compared = crashing\n"
        "runner_worker.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(session_cache, "_RUNNER_WORKER", "crashes_later")
    found, said = measured(model, tmp_path / "later")
    assert max(starts) > 0
    assert found.tensors == whole.tensors
    assert any("first layer" in line and "SIGABRT" in line for line in said)
