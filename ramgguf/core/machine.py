"""How much memory this machine has left: for the whole system, and within this process's cgroup."""

from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.errors import BudgetError
from ramgguf.core.units import parse_size

_ROOT = Path("/")


@dataclass(frozen=True)
class Available:
    """Bytes that may be used, and who says so."""

    n_bytes: int
    source: str


def available_memory(root: Path = _ROOT) -> Available:
    """Return the smaller of MemAvailable and what the cgroups (v1 or v2) leave.

    A cgroup leaves its limit less what is used and cannot be dropped; those above it count, too.
    root is where /proc and /sys are. Raises BudgetError where neither can be read.
    """
    found = [a for a in (_system(root), *_cgroups(root)) if a is not None]
    if not found:
        raise BudgetError("this system does not tell its available memory; name it with --memory")
    return min(found, key=lambda a: a.n_bytes)


def within_cgroup(asked: Available, root: Path = _ROOT) -> Available:
    """Return what was asked for, or what the cgroups leave if that is less."""
    return min([asked, *_cgroups(root)], key=lambda a: a.n_bytes)


def memory_limit(memory: str | None, root: Path = _ROOT) -> Available:
    """Return what a size such as 16GB names, or what the cgroups leave of it; None: what is left.

    Raises BudgetError for a text that is no size.
    """
    if memory is None:
        return available_memory(root)
    return within_cgroup(Available(parse_size(memory), "--memory"), root)


def _system(root: Path) -> Available | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return Available(1024 * int(value.split()[0]), "MemAvailable")
    return None


def _cgroups(root: Path) -> list[Available]:
    """Return what the process's memory cgroup and all above it leave."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.strip("/")
        # Within a container the path may be the host's, and its own group the root.
        for place in (folder, *folder.parents):
            left = _left(place, *names)
            if left is not None:
                found.append(left)
            if place == base:
                break
    return found


def _left(folder: Path, limit_name: str, usage_name: str, droppable_name: str) -> Available | None:
    limit, usage = _number(folder / limit_name), _number(folder / usage_name)
    if limit is None or limit >= 1 << 60:  # v1 writes a huge number for "none"
        return None
    droppable = 0
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == droppable_name:
            droppable = int(value)
    left = max(0, limit - max(0, (usage or 0) - droppable))
    return Available(left, f"the cgroup's limit of {limit} bytes")


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
