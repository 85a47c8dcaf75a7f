"""How a child process is held to a memory limit (a cgroup of systemd's, or an rlimit), its peak."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limiter:
    """The command that a child is run by, and how it is limited, in words.

    rlimit is what the child sets itself: RLIMIT_DATA, which counts memory that is its own and
    writable as soon as it is asked for, touched or not.
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


def peak_bytes() -> int:
    """Return the most memory that this process has held, what was swapped out included."""
    found = {"VmHWM": 0, "VmSwap": 0}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return sum(found.values())
