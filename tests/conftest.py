"""Fixtures shared by all tests: real models, made once and kept in the user's cache."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort must not wait for a debugger

# Started in the background of a script, Ctrl-C is ignored, and by every child as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_TOOL = Path(__file__).parent.parent / "tools" / "real_models.py"


def _models() -> Path:
    if folder := os.environ.get("RAMGGUF_MODELS"):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ramgguf" / "models"


def _real_model(label: str) -> Path:
    """Return the path of the model, made on first use; skip the test if that cannot be."""
    path = _models() / f"{label}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in two processes
        if not path.exists():
            command = [sys.executable, str(_TOOL), "--out", str(path.parent), "--only", label]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                pytest.skip(f"{label} cannot be made: {lines[-1]}")
    return path


@pytest.fixture(scope="session")
def model_cache() -> Path:
    """The folder where models made by tests are kept from run to run."""
    folder = _models()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smol768() -> Path:
    """A real llama model in F16; every row is a multiple of 256 weights."""
    return _real_model("smol768-f16")


@pytest.fixture(scope="session")
def smol768_bf16() -> Path:
    """The same in BF16."""
    return _real_model("smol768-bf16")


@pytest.fixture(scope="session")
def smol135() -> Path:
    """The same network in F16 with rows of 576 weights, which K-quants do not suit."""
    return _real_model("smol135-f16")


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[ModuleType]:
    """The low-level module of llama-cpp-python, its log silenced."""
    module: ModuleType = pytest.importorskip("llama_cpp")
    silence = module.llama_log_callback(lambda level, text, data: None)
    module.llama_log_set(silence, None)
    yield module
    module.llama_log_set(module.llama_log_callback(0), None)


def _mount(folder: Path, arguments: Sequence[str]) -> Iterator[Path]:
    """Mount what the arguments say for the time of a test, where the system lets us."""
    folder.mkdir()
    mount = ["mount", *arguments, str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_disk(path: Path, *, leave: int) -> None:
    """Write a file that takes its disk up to so many bytes, rounded to pages; all of it for 0."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        status = os.statvfs(path)
        n_bytes = status.f_bavail * status.f_frsize - max(leave, status.f_frsize)
        while n_bytes > 0 or not leave:  # root has more than is said to be available
            n_bytes -= file.write(bytes(min(n_bytes, 1 << 20) if n_bytes > 0 else 1 << 20))


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty file system of a few MB: in memory, and ext4 in a file (loop)."""
    if request.param == "tmpfs":
        yield from _mount(tmp_path / "disk", ["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        return
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    make = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-b", "1024", str(image)]
    if not shutil.which("mkfs.ext4") or subprocess.run(make, check=False).returncode:
        pytest.skip("there is no mkfs.ext4")
    for folder in _mount(tmp_path / "disk", ["-o", "loop", str(image)]):
        (folder / "lost+found").rmdir()
        yield folder


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that not even root may write."""
    yield from _mount(tmp_path / "read-only", ["-t", "tmpfs", "-o", "ro,size=1m", "tmpfs"])
