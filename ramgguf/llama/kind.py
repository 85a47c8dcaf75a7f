"""What a loaded model is for: llama.cpp is asked, so that only next-token predictors are scored."""

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from ramgguf.core.errors import EngineError

ModelKind = Literal["causal", "embedding", "reranker", "encoder-decoder", "diffusion"]

_WHAT: dict[ModelKind, str] = {
    "causal": "is a causal language model, which gives no embedding of a text",
    "embedding": "is an embedding model, which predicts no next token",
    "reranker": "is a reranker, which predicts no next token",
    "encoder-decoder": "has an encoder beside its decoder, which is not run here",
    "diffusion": "is a diffusion model, which predicts no next token",
}
_INSTEAD = "quantize it by priors (--effort fast), without scores or calibration"
_TO_DO: dict[ModelKind, str] = {
    "causal": "give the original of an embedding model with embedding models only",
    "embedding": "`ramgguf eval FILE --reference ORIGINAL` compares its embeddings with those of"
    f" its original; {_INSTEAD}",
    "reranker": _INSTEAD,
    "encoder-decoder": _INSTEAD,
    "diffusion": _INSTEAD,
}

POOLINGS = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}  # enum llama_pooling_type


class KindError(EngineError):
    """The model is not of the kind that was to be run."""

    def __init__(self, path: Path | str, kind: ModelKind) -> None:
        super().__init__(f"{path} {_WHAT[kind]}: {_TO_DO[kind]}")
        self.kind = kind


def kind_of(llama: ModuleType, model: Any, context: Any) -> ModelKind:
    """Return what llama.cpp says that a model, with a context of its own settings, is for.

    A decoder that pools its tokens (Qwen3-Embedding) or attends to later ones is an embedding
    model, whatever its architecture is used for elsewhere.
    """
    has_decoder = bool(llama.llama_model_has_decoder(model))
    if llama.llama_model_has_encoder(model) and has_decoder:
        return "encoder-decoder"
    pooling = POOLINGS.get(llama.llama_pooling_type(context), "none")
    if pooling == "rank":
        return "reranker"
    if llama.llama_model_is_diffusion(model):
        return "diffusion"
    causal = bool(llama.llama_get_causal_attn(context))
    return "causal" if has_decoder and causal and pooling == "none" else "embedding"


def run_batch(llama: ModuleType, model: Any, context: Any, batch: Any) -> int:
    """Compute a batch of an embedding model's tokens; return llama.cpp's code, 0 for success.

    What keeps no keys and values, and an encoder alone, is no decoder to llama.cpp.
    """
    encodes = llama.llama_model_has_encoder(model) or not llama.llama_get_memory(context)
    run = llama.llama_encode if encodes else llama.llama_decode
    return int(run(context, batch))
