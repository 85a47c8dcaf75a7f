"""How a child process is held to a memory limit: by a cgroup of systemd's, or by its own rlimit."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


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
