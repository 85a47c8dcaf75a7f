"""One input, one plan, one version: one output, for any number of threads and ISA level."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_samples import write_model
from imatrix_samples import write_gguf
from ramgguf import _core

N_LAYERS, WIDTH, N_EXPERTS = 2, 256, 3

# Every combination in one process: most of the time is spent starting it.
_RUNS = """
import hashlib, json, sys
from pathlib import Path
import ramgguf
from ramgguf.core import parallel
source, imatrix, folder = sys.argv[1:]
parallel.CHUNK_WEIGHTS, parallel.BATCH_WEIGHTS = 1 << 12, 1 << 14  # many chunks
found = {}
for encoder in ("rtn", "search"):
    for weighed in (None, imatrix):
        for threads in (1, 2, 3, 7):
            made = ramgguf.quantize(
                source, "5bpw", Path(folder) / "out.gguf", encoder=encoder, imatrix=weighed,
                min_sqnr_db=0, threads=threads, force=True,
            )
            key = f"{encoder} {'with' if weighed else 'without'} imatrix"
            digest = hashlib.sha256(made.paths[0].read_bytes()).hexdigest()
            plan = made.plan.model_dump_json()
            found.setdefault(key, {})[threads] = [digest, plan]
print(json.dumps(found))
"""

Found = dict[str, dict[str, list[str]]]


def _found(isa: str, source: Path, imatrix: Path, folder: Path) -> Found:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, str(source), str(imatrix), str(folder)],
        env={**os.environ, "RAMGGUF_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Found = json.loads(done.stdout)
    return found


@pytest.fixture
def imatrix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {}
    for i in range(N_LAYERS):
        for name, n, width in ((f"blk.{i}.attn_q", 1, WIDTH),
                               (f"blk.{i}.ffn_down_exps", N_EXPERTS, 2 * WIDTH)):  # fmt: skip
            tensors[f"{name}.weight.in_sum2"] = rng.gamma(1, 1, (n, width)).astype(np.float32)
            tensors[f"{name}.weight.counts"] = np.full((n, 1), 4, np.float32)
    return write_gguf(tmp_path / "imatrix.gguf", tensors)


def test_threads_and_isa_levels_do_not_change_a_byte(tmp_path: Path, imatrix: Path) -> None:
    source = write_model(tmp_path / "a.gguf", rng=np.random.default_rng(2), n_layers=N_LAYERS)
    levels = _core.supported_isas()
    found = [_found(isa, source, imatrix, tmp_path / isa) for isa in levels]
    outputs = {}
    for key in found[0]:
        kinds = {tuple(run) for level in found for run in level[key].values()}
        assert len(kinds) == 1, key
        outputs[key] = kinds.pop()
    # Encoders and importance do make a difference: the comparison would notice one.
    assert len(set(outputs.values())) == len(outputs) == 4
