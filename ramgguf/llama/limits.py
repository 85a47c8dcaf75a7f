"""How a child process is held to a memory limit (a cgroup of systemd's, or an rlimit), its peak."""

import resource
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import EngineError


@dataclass(frozen=True)
class Limiter:
    """The command that a child is run by, and how it is limited, in words.

    rlimit is what the child holds itself to with limit_data.
    """

    runner: tuple[str, ...]
    rlimit: int | None
    method: str


def limiter(n_bytes: int) -> Limiter:
    """Return the best way that this system offers to hold a child to n_bytes."""
    scope = (
        "systemd-run", "--user", "--scope", "--quiet", "--collect",
        "-p", f"MemoryMax={n_bytes}", "-p", "MemorySwapMax=0", "--",
    )  # fmt: skip
    if shutil.which(scope[0]) and _runs([*scope, "true"]):
        return Limiter(scope, None, "cgroup (a systemd scope with MemoryMax)")
    return Limiter((), n_bytes, "RLIMIT_DATA, for no cgroup can be made here")


def _runs(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


# An rlimit counts reserved memory, touched or not. With one thread, allocators and stacks reserve
# 20 to 40 MB that nobody touches, and without this allowance a process that fits would end. One
# that uses the allowance shows by its peak_bytes.
_UNTOUCHED_BYTES = 64 << 20
_STACK_BYTES = 8 << 20


def limit_data(n_bytes: int, n_threads: int) -> None:
    """Hold this process to n_bytes, and the room for what n_threads reserve without touching it.

    What is resident now counts, and all that it asks for from now on. Raises EngineError when the
    process is larger already.
    """
    now = _status()
    left = n_bytes - now["VmRSS"]
    if left <= 0:
        raise EngineError(f"the process alone takes {now['VmRSS']} bytes")
    room = _UNTOUCHED_BYTES + n_threads * _STACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (now["VmData"] + left + room, resource.RLIM_INFINITY))


def cap_growth(n_bytes: int) -> None:
    """Hold this process to the data that it has now and n_bytes more, where the system can.

    An allocation beyond that fails: NumPy and Python raise MemoryError, C++ ends the process.
    """
    try:
        n_data = _status()["VmData"]
    except OSError:  # no /proc: macOS, whose RLIMIT_DATA does not count mapped memory
        return
    limit = n_data + n_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def peak_bytes() -> int:
    """Return the most memory that this process has held, what was swapped out included."""
    now = _status()
    return now["VmHWM"] + now["VmSwap"]


def _status() -> dict[str, int]:
    """Return the sizes that Linux tells of this process, by its names for them, in bytes."""
    found = {"VmHWM": 0, "VmSwap": 0, "VmRSS": 0, "VmData": 0}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found
