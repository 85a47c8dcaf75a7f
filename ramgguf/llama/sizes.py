"""The child process that asks llama.cpp how much memory models and contexts would take.

Nothing is allocated and no weights are read (no_alloc): the file may be a header over a hole.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.gguf.header import ggml_type
from ramgguf.llama.breakdown import memory_breakdown
from ramgguf.llama.child import answer_requests
from ramgguf.llama.system import llama_module

# The batch sizes of llama.cpp's programs.
N_BATCH, N_UBATCH = 2048, 512


class SizesOf(FrozenModel):
    """How much would the model in this file take, with a context like this?

    n_ctx is the tokens of all n_seq sequences together. real allocates and loads all there is.
    """

    path: str
    n_ctx: int
    n_seq: int
    type_k: str
    type_v: str
    real: bool = False


class Sizes(FrozenModel):
    """Bytes by purpose, exact; cache is KV and recurrent state."""

    kind: Literal["sizes"] = "sizes"
    weights: int
    cache: int
    compute: int
    n_vocab: int
    build: str


class Sizer:
    """Answers for one model after the other; the last one stays loaded."""

    def __init__(self) -> None:
        self._llama = llama_module()
        self._loaded: tuple[str, bool] | None = None
        self._model: Any = None

    def sizes(self, request: SizesOf) -> Sizes:
        """Return what llama.cpp would allocate; raises EngineError if it refuses or cannot tell."""
        llama = self._llama
        self._load(request.path, real=request.real)
        context = llama.llama_init_from_model(self._model, context_parameters(llama, request))
        if not context:
            raise EngineError(
                f"llama.cpp cannot make a context of {request.n_ctx} tokens with a cache of "
                f"{request.type_k} and {request.type_v}"
            )
        try:
            found = memory_breakdown(llama, context)
        finally:
            llama.llama_free(context)
        if found is None:
            raise EngineError("this build of llama.cpp does not tell how much memory it takes")
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        return Sizes(
            weights=sum(b.weights for b in found),
            cache=sum(b.cache for b in found),
            compute=sum(b.compute for b in found),
            n_vocab=n_vocab,
            build=llama.llama_version().decode(),
        )

    def _load(self, path: str, *, real: bool) -> None:
        llama = self._llama
        if self._loaded == (path, real):
            return
        if self._model:
            llama.llama_model_free(self._model)
        self._loaded = None
        parameters = llama.llama_model_default_params()
        if not hasattr(parameters, "no_alloc"):
            raise EngineError(f"llama-cpp-python {llama.__version__} cannot load without weights")
        parameters.n_gpu_layers = 0
        parameters.no_alloc = not real
        parameters.load_mode = 0  # read, not mapped: what is resident once all of it was used
        self._model = llama.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise EngineError(f"{Path(path).name}: llama.cpp cannot load it")
        self._loaded = (path, real)


def context_parameters(llama: ModuleType, request: SizesOf) -> Any:
    """Return a context's parameters as llama.cpp's own programs have them.

    Only the layers with a sliding window keep a window's worth (swa_full is off there).
    """
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = request.n_ctx, request.n_seq
    parameters.n_batch, parameters.n_ubatch = N_BATCH, N_UBATCH
    parameters.type_k = ggml_type(request.type_k).id
    parameters.type_v = ggml_type(request.type_v).id
    parameters.swa_full = False
    return parameters


def main() -> None:
    """Answer SizesOf with Sizes until the parent goes."""
    sizer: list[Sizer] = []

    def answer(request: SizesOf) -> Sizes:
        if not sizer:
            sizer.append(Sizer())  # here, for its errors are answers
        return sizer[0].sizes(request)

    answer_requests(TypeAdapter(SizesOf), answer)


if __name__ == "__main__":
    main()
