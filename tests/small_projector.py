"""A small mmproj file: an encoder of SigLIP's kind with Gemma 3's projection, random weights."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from gguf_samples import finish_gguf
from tiny_models import WIDTH

EMBEDDING, FFN, N_LAYERS, N_HEADS = 256, 512, 4, 4
SIDE, PATCH, MERGE = 64, 16, 2
PATCH_EMBEDDING, POSITIONS = "v.patch_embd.weight", "v.position_embd.weight"
PROJECTION = "mm.input_projection.weight"
Arrays = dict[str, NDArray[np.float32]]


def projector_tensors(seed: int = 0) -> Arrays:
    """Return an encoder of SigLIP's kind and the projection of Gemma 3, as llama.cpp names them."""
    rng = np.random.default_rng(seed)
    found: Arrays = {}

    def add(name: str, *shape: int) -> None:
        found[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = np.ones(width, np.float32)
        found[f"{name}.bias"] = np.zeros(width, np.float32)

    add(PATCH_EMBEDDING, EMBEDDING, 3, PATCH, PATCH)
    found["v.patch_embd.bias"] = np.zeros(EMBEDDING, np.float32)
    add(POSITIONS, (SIDE // PATCH) ** 2, EMBEDDING)
    for layer in range(N_LAYERS):
        block = f"v.blk.{layer}."
        norm(block + "ln1", EMBEDDING)
        norm(block + "ln2", EMBEDDING)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"{block}{part}.weight", EMBEDDING, EMBEDDING)
            found[f"{block}{part}.bias"] = np.zeros(EMBEDDING, np.float32)
        add(block + "ffn_up.weight", FFN, EMBEDDING)
        found[block + "ffn_up.bias"] = np.zeros(FFN, np.float32)
        add(block + "ffn_down.weight", EMBEDDING, FFN)
        found[block + "ffn_down.bias"] = np.zeros(EMBEDDING, np.float32)
    norm("v.post_ln", EMBEDDING)
    add(PROJECTION, EMBEDDING, WIDTH)
    found["mm.soft_emb_norm.weight"] = np.ones(EMBEDDING, np.float32)
    return found


def write_projector(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> Path:
    """Write an mmproj file with matrices in F16, as llama.cpp's converter does."""
    out = gguf.GGUFWriter(path, "clip")
    out.add_type("mmproj")
    out.add_bool("clip.has_vision_encoder", True)
    out.add_bool("clip.use_gelu", True)
    out.add_string("clip.projector_type", "gemma3")
    numbers = {
        "embedding_length": EMBEDDING, "feed_forward_length": FFN, "block_count": N_LAYERS,
        "attention.head_count": N_HEADS, "projection_dim": WIDTH, "image_size": SIDE,
        "patch_size": PATCH, "projector.scale_factor": MERGE,
    }  # fmt: skip
    for key, value in numbers.items():
        out.add_uint32(f"clip.vision.{key}", value)
    out.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        out.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    for name, array in tensors.items():
        half = array.ndim > 1 and name.endswith("weight") and name != POSITIONS
        out.add_tensor(name, array.astype(np.float16) if half else array)
    finish_gguf(out)
    return path
