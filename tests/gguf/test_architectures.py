"""Models of many architectures, embedding models and models without a tokenizer among them.

Each is made at random, quantized to a budget and run by llama.cpp.
"""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import ramgguf
from model_outputs import outputs
from ramgguf.gguf.architecture import never_quantized
from ramgguf.gguf.reader import open_gguf
from small_models import ARCHITECTURES, Architecture, write_small_model


@pytest.mark.parametrize("budget", ["9bpw", "6bpw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_llama_cpp_runs_what_was_quantized(
    architecture: Architecture, budget: str, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source = write_small_model(tmp_path / "source.gguf", architecture)
    target = tmp_path / "target.gguf"
    result = ramgguf.quantize(source, budget, target, min_sqnr_db=0, threads=2, effort="fast")
    assert target.stat().st_size == result.n_bytes <= result.plan.budget
    n_quantized = 0
    with open_gguf(source) as before, open_gguf(target) as after:
        for old, new in zip(before.tensors, after.tensors, strict=True):
            n_quantized += new.type_name != old.type_name
            if never_quantized(old.name, old.shape):
                assert new.type_name == old.type_name
    assert n_quantized > 5
    expected = outputs(llama_cpp, source, architecture)
    found = outputs(llama_cpp, target, architecture)
    assert np.isfinite(found).all()
    similarity = float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
    assert similarity > (0.99 if budget == "9bpw" else 0.9)
    assert similarity < 1 - 1e-9
