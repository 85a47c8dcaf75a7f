"""A Dask cluster of this machine: a scheduler and two workers, one of which is killed midway."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ramgguf.cluster.executors import connected
from ramgguf.core.errors import EngineError
from tiny_models import write_tiny_model
from work_samples import measured, plan_and_curves, refined, scored, timeless, untimed

pytest.importorskip("llama_cpp")
distributed = pytest.importorskip("distributed")
PATIENCE = 300  # seconds that a process may take to start on a busy machine
# Dask's connections are closed by its event loop, at times after they are collected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


class Cluster:
    """A scheduler and its workers, processes of their own."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._marks: dict[int, str] = {}
        self.workers: list[subprocess.Popen[bytes]] = []
        scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0")
        log = self._log(scheduler)
        self.address = _found(log, rb"Scheduler at:\s+tcp://(127\.0\.0\.1:\d+)", scheduler)

    def add_worker(self) -> None:
        """Start a worker with one thread, and wait until it is connected."""
        worker = self._start("worker", self.address, "--nthreads", "1", "--no-nanny")
        self.workers.append(worker)
        _found(self._log(worker), rb"Registered to:\s+(tcp://)", worker)

    def kill_worker(self) -> None:
        """Kill the oldest worker with SIGKILL; its child must end by itself."""
        worker = self.workers.pop(0)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        deadline = time.monotonic() + PATIENCE
        while _living(self._marks[worker.pid]):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        mark = uuid.uuid4().hex
        tests = str(Path(__file__).parents[1])
        environment = {**os.environ, "RAMGGUF_TEST": mark, "PYTHONPATH": tests}
        log = self._stack.enter_context((self._folder / f"{mark}.log").open("wb"))
        process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments, "--no-dashboard"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._folder,
            )
        )
        self._stack.callback(process.kill)
        self._marks[process.pid] = mark
        return process

    def _log(self, process: subprocess.Popen[bytes]) -> Path:
        return self._folder / f"{self._marks[process.pid]}.log"


def _found(log: Path, pattern: bytes, process: subprocess.Popen[bytes]) -> str:
    """Wait until the log has the pattern, and return its group."""
    deadline = time.monotonic() + PATIENCE
    while not (found := re.search(pattern, log.read_bytes())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[1].decode()


def _living(mark: str) -> bool:
    """Return whether a process has the mark in its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_text(errors="replace"):
                return True
        except OSError:  # it ended meanwhile
            continue
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        found = Cluster(tmp_path_factory.mktemp("cluster"), stack)
        yield found


@pytest.fixture
def two_workers(cluster: Cluster) -> Cluster:
    while len(cluster.workers) < 2:
        cluster.add_worker()
    return cluster


class Killing:
    """Progress that kills a worker after so many steps; `at` says how many were done then."""

    def __init__(self, cluster: Cluster, after: int) -> None:
        self._cluster, self._after = cluster, after
        self.at: int | None = None
        self.n_done = self.total = 0

    def start(self, stage: str, total: int, unit: str) -> None:
        self.total = total

    def advance(self, n: int) -> None:
        self.n_done += n
        if self.at is None and self.n_done >= self._after:
            self.at = self.n_done
            self._cluster.kill_worker()

    def finish(self) -> None:
        pass

    def check(self) -> None:
        """Assert that the worker was killed midway, and that everything was done all the same."""
        assert self.at is not None
        assert self.at < self.n_done == self.total


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return write_tiny_model(path, weight_type="F16", n_layers=4)


def test_sensitivities_equal_those_of_one_machine_though_a_worker_is_killed(
    two_workers: Cluster, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    killing = Killing(two_workers, after=5)
    with connected(f"dask://{two_workers.address}") as executor:
        found = measured(model, tmp_path, executor, killing)
    killing.check()
    assert timeless(found) == timeless(measured(model, tmp_path / "alone"))


def test_scores_equal_those_of_one_machine_though_a_worker_is_killed(
    two_workers: Cluster, tmp_path: Path
) -> None:
    models = [write_tiny_model(tmp_path / f"{n}.gguf", noise=n) for n in (0.0, 0.05)]
    killing = Killing(two_workers, after=6)
    with distributed.Client(two_workers.address, timeout=PATIENCE) as dask:
        found = scored(models, tmp_path / "there.jsonl", dask.get_executor(), killing)
    killing.check()
    assert found.failures == ()
    assert untimed(found) == untimed(scored(models, tmp_path / "here.jsonl"))


def test_refined_plans_equal_those_of_one_machine_though_a_worker_is_killed(
    two_workers: Cluster, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "alone").mkdir()
    made = plan_and_curves(model)
    killing = Killing(two_workers, after=2)
    with connected(f"dask://{two_workers.address}") as executor:
        found = refined(model, made, tmp_path, executor, killing)
    killing.check()
    assert found == refined(model, made, tmp_path / "alone")


def test_a_scheduler_that_is_not_there_is_one_line_within_seconds() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(EngineError) as caught, connected(f"dask://127.0.0.1:{port}"):
        pass
    assert str(caught.value).startswith(f"dask://127.0.0.1:{port}: no scheduler answers there (")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 30


def test_the_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(EngineError, match=r"pip install 'ramgguf\[cluster\]'"),
        connected("dask://127.0.0.1:8786"),
    ):
        pass
