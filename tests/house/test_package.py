"""What is shipped: a source distribution that builds on its own, and a typed package."""

import subprocess
import sys
import tarfile
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The files of the sdist and their sizes."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        return {m.name.partition("/")[2]: m.size for m in tar.getmembers() if m.isfile()}


def test_the_source_distribution_has_every_source(shipped: dict[str, int]) -> None:
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder, patterns in {
            "cpp": ("*.cpp", "*.h", "*.def", "*.in"),
            "ramgguf": ("*.py", "*.pyi", "*.txt", "*.md", "*.css", "*.js", "py.typed"),
        }.items()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    ]
    assert len(sources) > 80
    needed = {*sources, "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert needed <= set(shipped)


def test_the_source_distribution_has_no_ballast(shipped: dict[str, int]) -> None:
    assert sum(shipped.values()) < 10_000_000
    assert not [n for n in shipped if n.endswith((".gguf", ".so", ".whl", ".jsonl"))]
    assert not [n for n in shipped if n.startswith(("build/", ".venv/", "models/"))]


def test_the_installed_package_is_typed_and_brings_its_corpus() -> None:
    assert resources.files("ramgguf").joinpath("py.typed").is_file()
    text = resources.files("ramgguf.core").joinpath("data", "wikitext2-test.txt").read_bytes()
    assert text.startswith(b" = Robert Boulter = \n")
    extras = set(metadata.metadata("ramgguf").get_all("Provides-Extra") or ())
    assert {"eval", "report"} <= extras


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "ramgguf", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"ramgguf {metadata.version('ramgguf')} (")
