"""A command in a process of its own, timed, with the memory that it takes."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """What a command took: peaks in bytes, times in seconds, and what it printed.

    rss_anon_bytes is memory of the process's own, sampled; max_rss_bytes, by the kernel, has the
    pages of mapped files in it, too, which others may share and the kernel may take back, and is
    never less than what the process that started it had.
    """

    seconds: float
    cpu_seconds: float
    rss_anon_bytes: int
    max_rss_bytes: int
    stdout: str


def run(command: Sequence[str]) -> Measured:
    """Run the command to its end. Raises RuntimeError with its last words when it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdout is not None
    stderr = process.stderr
    assert stderr is not None
    said: list[str] = []
    listener = threading.Thread(target=lambda: said.append(stderr.read()))
    listener.start()
    peak = [0]
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, stop))
    sampler.start()
    stdout = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    stop.set()
    sampler.join()
    listener.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {''.join(said)[-500:]}")
    cpu = usage.ru_utime + usage.ru_stime
    unit = 1 if sys.platform == "darwin" else 1024
    return Measured(seconds, cpu, peak[0], usage.ru_maxrss * unit, stdout)


def _sample(pid: int, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_SECONDS):
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        if found := re.search(r"RssAnon:\s+(\d+) kB", text):
            peak[0] = max(peak[0], 1024 * int(found[1]))
