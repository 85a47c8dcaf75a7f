"""Models of many architectures, embedding models and models without a tokenizer among them.

Each is made at random, quantized to a budget and run by llama.cpp.
"""

import ctypes
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

import ramgguf
from ramgguf.gguf_io import open_gguf
from ramgguf.roles import never_quantized
from small_models import ARCHITECTURES, N_CONTEXT, N_VOCAB, WIDTH, Architecture, write_small_model

_TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 97, 93]


def outputs(llama_cpp: ModuleType, path: Path, architecture: Architecture) -> NDArray[np.float32]:
    """Return what llama.cpp computes for some tokens: logits, or the pooled embedding."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = False  # AMX kernels of some builds crash on Q4_1
    model = llama_cpp.llama_model_load_from_file(bytes(path), model_params)
    assert model, f"llama.cpp does not load {architecture.name}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = N_CONTEXT
    params.n_threads = params.n_threads_batch = 2
    params.embeddings = architecture.embeds
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        tokens = (llama_cpp.llama_token * len(_TOKENS))(*_TOKENS)
        batch = llama_cpp.llama_batch_get_one(tokens, len(_TOKENS))
        if architecture.embeds or architecture.has_encoder:
            assert llama_cpp.llama_encode(context, batch) == 0
        if architecture.has_encoder:  # then the decoder's first token
            batch = llama_cpp.llama_batch_get_one(tokens, 1)
        if not architecture.embeds:
            assert llama_cpp.llama_decode(context, batch) == 0
        if architecture.embeds:
            pointer, n = llama_cpp.llama_get_embeddings_seq(context, 0), WIDTH
        else:
            pointer, n = llama_cpp.llama_get_logits_ith(context, -1), N_VOCAB
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * n)).contents
        return np.array(values, np.float32)
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


@pytest.mark.parametrize("budget", ["9bpw", "6bpw"])
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_llama_cpp_runs_what_was_quantized(
    architecture: Architecture, budget: str, tmp_path: Path, llama_cpp: ModuleType
) -> None:
    source = write_small_model(tmp_path / "source.gguf", architecture)
    target = tmp_path / "target.gguf"
    result = ramgguf.quantize(source, budget, target, min_sqnr_db=0, threads=2)
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
