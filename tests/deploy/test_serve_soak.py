"""A soak of the server: hostile and good requests in turn, and the memory of its processes.

RAMGGUF_SERVE_SOAK is the number of hostile requests, with ten times as many good ones; the printed
line (pytest -s) has the figures. Without it, a short one is run, in which memory is not judged.
"""

import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from ramgguf.deploy.serving import Server
from serve_requests import (
    good_requests,
    hostile_requests,
    model_pid,
    serve,
    slow_requests,
    write_model,
)

pytest.importorskip("llama_cpp")
pytest.importorskip("starlette")

N_HOSTILE = int(os.environ.get("RAMGGUF_SERVE_SOAK", "0"))
SHORT = 60, 200, 4  # hostile, good, slow
MOST_GROWTH = 100_000  # bytes per 1,000 requests: a byte too much per request is a tenth of it


@dataclass(frozen=True)
class Sample:
    """Resident bytes without files of the front's and the model's process after n requests."""

    n_requests: int
    front_bytes: int
    model_bytes: int
    model_pid: int


@dataclass(frozen=True)
class Soaked:
    """What a soak saw; wrong names requests that were answered otherwise than they must be."""

    n_hostile: int
    n_good: int
    n_killed: int
    n_restarts: int
    wrong: dict[str, int]
    seconds: float
    samples: tuple[Sample, ...]

    def growth(self, process: str) -> float:
        """Return the slope of a process's memory, in bytes per 1,000 requests.

        The first quarter of the samples is left out, in which buffers and caches fill. The model's
        are those since its last restart.
        """
        kept = self.samples
        if process == "model":
            kept = tuple(s for s in kept if s.model_pid == kept[-1].model_pid)
        kept = kept[len(kept) // 4 :]
        if len(kept) < 2:
            return 0.0
        n = [s.n_requests / 1000 for s in kept]
        sizes = [float(getattr(s, f"{process}_bytes")) for s in kept]
        return float(np.polyfit(n, sizes, 1)[0])

    def told(self) -> dict[str, object]:
        """Return the figures, with memory at the first sample that counts and at the last."""
        first, last = self.samples[len(self.samples) // 4], self.samples[-1]
        told = asdict(self) | {"samples": len(self.samples)}
        for process in ("front", "model"):
            told[f"{process}_bytes"] = [getattr(s, f"{process}_bytes") for s in (first, last)]
            told[f"{process}_growth_per_1000"] = round(self.growth(process))
        return told


def resident_bytes(pid: int) -> int:
    """Return the bytes of a process that are its own: without pages of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def soak(
    server: Server, n_hostile: int, n_good: int, *, n_slow: int, every: int = 50, seed: int = 0
) -> Soaked:
    """Send both kinds in an order that the seed gives, and sample memory every so many requests.

    n_slow of the hostile ones are those that take seconds; the kills among them come in the first
    half, so that the memory of one process is seen for a while. Each hostile request is followed by
    a good one.
    """
    rng, start = random.Random(seed), time.monotonic()
    hostile, slow, good = [*hostile_requests()], slow_requests(), itertools.cycle(good_requests())
    rng.shuffle(hostile)
    quick = itertools.islice(itertools.cycle(hostile), n_hostile)
    late = list(itertools.islice(itertools.cycle(slow), n_slow))
    at = {int((k + 1) * n_hostile / (2 * n_slow + 2)): one for k, one in enumerate(late)}
    order = [at[k] if k in at else next(quick) for k in range(n_hostile)]
    wrong: Counter[str] = Counter()
    samples: list[Sample] = []
    pids = {model_pid(server)}
    n_killed = n_done = 0
    n_between = -(-n_good // n_hostile)
    for one in order:
        status = one.send(server)
        n_killed += one.kind == "killed"
        if status not in one.allowed:
            wrong[f"{one.kind}: {status}"] += 1
        pids.add(model_pid(server))
        for ask_good in itertools.islice(good, n_between):
            if not ask_good(server):
                wrong["good"] += 1
        n_done += 1 + n_between
        if n_done // every != (n_done - 1 - n_between) // every:
            pid = model_pid(server)
            samples.append(Sample(n_done, resident_bytes(server.pid), resident_bytes(pid), pid))
    seconds = time.monotonic() - start
    return Soaked(
        n_hostile, n_hostile * n_between, n_killed, len(pids) - 1, dict(wrong), seconds,
        tuple(samples),
    )  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serve(write_model(tmp_path / "chat.gguf"), allow_grammars=True) as found:
        yield found


def test_hostile_requests_are_refused_good_ones_answered_and_no_restart_is_lost(
    server: Server,
) -> None:
    n_hostile, n_good, n_slow = SHORT
    if N_HOSTILE:
        n_hostile, n_good, n_slow = N_HOSTILE, 10 * N_HOSTILE, min(40, N_HOSTILE // 4)
    found = soak(server, n_hostile, n_good, n_slow=n_slow)
    print(json.dumps(found.told()))
    assert found.wrong == {}
    assert found.n_killed == found.n_restarts >= 1
    assert found.n_good >= n_good
    if N_HOSTILE >= 1000:
        assert found.growth("front") < MOST_GROWTH
        assert found.growth("model") < MOST_GROWTH


@pytest.mark.parametrize("process", ["front", "model"])
def test_memory_that_grows_is_seen(process: str) -> None:
    samples = tuple(Sample(n, 10**6 + 200 * n, 10**6 + 200 * n, 1) for n in range(0, 9000, 100))
    assert Soaked(1, 1, 0, 0, {}, 1.0, samples).growth(process) == pytest.approx(200_000)
    restarted = tuple(Sample(s.n_requests, 5, 10**9 - s.n_requests, 7) for s in samples[:40])
    flat = tuple(Sample(s.n_requests, 5, 10**6, 8) for s in samples[40:])
    assert Soaked(1, 1, 1, 1, {}, 1.0, restarted + flat).growth(process) == pytest.approx(0, abs=1)
