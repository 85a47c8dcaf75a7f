"""The NEON level, cross-compiled and emulated, gives the same bytes (`make test-neon`)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_kernels import ROW, corpus

from ramgguf import _core
from ramgguf.quants import formats

CPP = Path(__file__).parents[2] / "cpp"
DRIVER = Path(__file__).parents[1] / "kernels_driver.cpp"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.skipif(
        "RAMGGUF_TEST_NEON" not in os.environ, reason="takes a minute: make test-neon"
    ),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason=f"needs {COMPILER} and {EMULATOR}: apt install g++-aarch64-linux-gnu qemu-user",
    ),
]


def _expected(encoder: str) -> bytes:
    x, found = corpus(), b""
    for name in formats.names():
        q = np.zeros((x.shape[0], formats.row_bytes(name, ROW)), np.uint8)
        _core.encode(name, "F32", x.view(np.uint8), q, encoder=encoder)
        s = _core.measure([name], "F32", x.view(np.uint8), encoder=encoder)
        e = s.errors[0]
        numbers = [s.sum, s.sum_squares, s.sum_cubes, s.sum_fourths, s.max_abs]
        error = [e.sum_squared_error, e.max_error]
        floats = np.empty(x.shape, np.float32)
        _core.decode(name, q, floats)
        found += q.tobytes() + np.array(numbers + error).tobytes() + floats.tobytes()
    return found


def _sources(folder: Path) -> list[str]:
    """Return the kernels' sources, with one made in the folder for each format, as CMake does."""
    names = re.findall(r"^X\((\w+),", (CPP / "formats/formats.def").read_text(), re.MULTILINE)
    assert tuple(names) == formats.names()
    template = (CPP / "kernels/format.cpp.in").read_text()
    found = [str(CPP / "kernels/codec.cpp"), str(DRIVER)]
    for name in names:
        source = folder / f"{name.lower()}.cpp"
        source.write_text(template.replace("@name@", name).replace("@header@", name.lower()))
        found.append(str(source))
    return found


def test_neon_gives_the_bytes_of_this_machine(tmp_path: Path) -> None:
    flags = "-std=c++17 -O0 -march=armv8-a -static -ffp-contract=off -fno-math-errno"
    driver, rows = tmp_path / "driver", tmp_path / "rows"
    build = [COMPILER, *flags.split(), "-DRAMGGUF_ISA=neon", f"-I{CPP}", *_sources(tmp_path), "-o"]
    subprocess.run([*build, str(driver)], check=True)
    corpus().tofile(rows)
    run = [EMULATOR, str(driver), str(rows), str(ROW)]
    found = subprocess.run(run, check=True, capture_output=True).stdout
    assert found == _expected("rtn") + _expected("search")
