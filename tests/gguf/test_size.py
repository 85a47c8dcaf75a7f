"""Size: tensors far larger than what is held of them, and very many of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

import ramgguf
from gguf_samples import finish_gguf
from ramgguf.gguf.reader import open_gguf

MB = 1 << 20

# Quantizes in at most so much memory more than there is once all is imported.
_RUN = """
import json, re, resource, sys
from pathlib import Path
import ramgguf
def status(key):
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+) kB", text)[1])
source, target, more = sys.argv[1], sys.argv[2], int(sys.argv[3])
ramgguf.quantize(sys.argv[4], "5bpw", target, encoder="rtn", threads=2, force=True)  # imports
limit = status("VmData") + more
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
made = ramgguf.quantize(source, "5bpw", target, encoder="rtn", threads=2, force=True)
print(json.dumps({"n_bytes": made.n_bytes, "peak": status("VmHWM")}))
"""


def _sparse(path: Path, n_rows: int, row_length: int) -> Path:
    """Write a model of one F16 tensor of zeros, which take no room on the disk."""
    out = GGUFWriter(path, "llama")
    out.add_block_count(1)
    out.add_tensor_info(
        "blk.0.ffn_up.weight", (n_rows, row_length), np.dtype(np.float16),
        2 * n_rows * row_length, GGMLQuantizationType.F16,
    )  # fmt: skip
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    assert out.fout is not None
    out.write_padding(out.fout[0], out.fout[0].tell())
    end = out.fout[0].tell() + 2 * n_rows * row_length
    out.close()
    with path.open("r+b") as file:
        file.truncate(end)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and /proc are Linux's")
@pytest.mark.parametrize("row_length", [4096, 1 << 20])
def test_a_tensor_many_times_larger_than_the_memory_is_quantized(
    row_length: int, tmp_path: Path
) -> None:
    peaks = []
    small = _sparse(tmp_path / "small.gguf", 8, 4096)
    limit = 64 * MB
    for n_weights in (1 << 24, 1 << 27):  # 32 MB and 256 MB
        source = _sparse(tmp_path / "large.gguf", n_weights // row_length, row_length)
        done = subprocess.run(
            [sys.executable, "-c", _RUN, source, tmp_path / "out.gguf", str(limit), small],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["n_bytes"] > n_weights // 5  # zeros are ternary: 1.69 bits per weight
        peaks.append(said["peak"])
    assert abs(peaks[1] - peaks[0]) < 16 * MB
    assert source.stat().st_size >= 4 * limit


def _many(path: Path, n_tensors: int) -> Path:
    """Write a model of so many tensors of 512 weights."""
    rng = np.random.default_rng(0)
    out = GGUFWriter(path, "llama")
    out.add_block_count(50)
    data = rng.standard_t(5, (n_tensors, 2, 256)).astype(np.float16)
    for i in range(n_tensors):
        out.add_tensor(f"blk.{i % 50}.ffn_up.{i // 50}.weight", data[i])
    finish_gguf(out)
    return path


def _cpu_seconds(source: Path, target: Path) -> float:
    start = time.process_time()
    measured = ramgguf.measure(source, threads=2)
    measured.save(target.with_suffix(".json"))
    made = ramgguf.quantize(source, "5bpw", target, measurement=measured, threads=2)
    assert made.worst_departure is not None
    curve = ramgguf.curve(measured)
    assert len(curve.tensors) == len(measured.tensors)
    with open_gguf(target) as file:
        assert len(file.tensors) == len(measured.tensors)
    return time.process_time() - start


def test_twenty_thousand_tensors_take_ten_times_what_two_thousand_take(tmp_path: Path) -> None:
    few, many = (
        _cpu_seconds(_many(tmp_path / f"{n}.gguf", n), tmp_path / f"{n}.out.gguf")
        for n in (2000, 20000)
    )
    assert many < 20 * few
    assert many < 120
