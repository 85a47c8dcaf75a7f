"""How much memory is left, by files as Linux writes them."""

from pathlib import Path

import pytest

from ramgguf.core.errors import BudgetError
from ramgguf.core.machine import available_memory, memory_limit

GB = 10**9


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _meminfo(n_bytes: int) -> dict[str, str]:
    return {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {n_bytes // 1000} kB\n"}


def _v2(limit: str, current: int, inactive: int, path: str = "a/b") -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}"
    return {
        "proc/self/cgroup": "0::/a/b\n",
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": str(current),
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def test_without_a_cgroup_it_is_what_the_system_says(tmp_path: Path) -> None:
    found = available_memory(_write(tmp_path, _meminfo(8 * GB)))
    assert found.n_bytes == 8 * GB // 1000 * 1024
    assert found.source == "MemAvailable"


def test_a_cgroup_v2_leaves_its_limit_less_what_cannot_be_dropped(tmp_path: Path) -> None:
    root = _write(tmp_path, _meminfo(8 * GB) | _v2(str(4 * GB), 2 * GB, GB))
    found = available_memory(root)
    assert found.n_bytes == 3 * GB
    assert "cgroup" in found.source


def test_a_cgroup_without_a_limit_leaves_everything(tmp_path: Path) -> None:
    root = _write(tmp_path, _meminfo(8 * GB) | _v2("max", 2 * GB, 0))
    assert available_memory(root).source == "MemAvailable"


def test_the_limit_of_a_cgroup_above_counts(tmp_path: Path) -> None:
    inner, outer = _v2("max", 0, 0), _v2(str(GB), 0, 0, path="a")
    assert available_memory(_write(tmp_path, _meminfo(8 * GB) | inner | outer)).n_bytes == GB


def test_the_system_counts_when_it_has_less_than_the_cgroup(tmp_path: Path) -> None:
    root = _write(tmp_path, _meminfo(GB) | _v2(str(4 * GB), 0, 0))
    assert available_memory(root).source == "MemAvailable"


def test_a_cgroup_v1_counts_too_even_when_its_path_is_the_hosts(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n",
        f"{folder}/memory.limit_in_bytes": str(2 * GB),
        f"{folder}/memory.usage_in_bytes": str(GB),
        f"{folder}/memory.stat": "total_inactive_file 500000000\n",
    }
    assert available_memory(_write(tmp_path, _meminfo(8 * GB) | files)).n_bytes == 1_500_000_000


def test_the_huge_limit_of_v1_is_none(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert available_memory(_write(tmp_path, _meminfo(GB) | files)).source == "MemAvailable"


def test_a_system_that_tells_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="--memory"):
        available_memory(tmp_path)


def test_this_machine_has_some() -> None:
    assert available_memory().n_bytes > 0


def test_a_limit_is_what_is_named_or_what_the_cgroup_leaves_of_it(tmp_path: Path) -> None:
    root = _write(tmp_path, _meminfo(8 * GB) | _v2(str(4 * GB), 2 * GB, GB))
    assert memory_limit("2GB", root).n_bytes == 2 * GB
    assert memory_limit("2GB", root).source == "--memory"
    assert memory_limit("16GB", root).n_bytes == 3 * GB
    assert memory_limit(None, root) == available_memory(root)
    with pytest.raises(BudgetError, match="is none; write 5GB"):
        memory_limit("much", root)
