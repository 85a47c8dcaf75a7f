"""What llama.cpp computes for a model, in this process."""

import ctypes
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from small_models import N_CONTEXT, N_VOCAB, WIDTH, Architecture

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
