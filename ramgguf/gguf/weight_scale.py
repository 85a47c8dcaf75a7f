"""Scales of whole tensors, in a tensor of their own: NAME.scale is that of NAME.weight.

Checkpoints in NVFP4 come so: one float32, or one for each expert. llama.cpp multiplies the product
with the scale, whatever type the weights have (src/llama-graph.cpp); that of the head it reads with
NVFP4 only (src/llama-model.cpp).
"""

import numpy as np

from ramgguf.gguf.reader import GGUFFile, TensorInfo

_ENDS = (".scale", ".input_scale")


def has_scale(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether the tensor has a scale, or its inputs have one."""
    stem = tensor.name.removesuffix(".weight")
    return any(file.has_tensor(stem + end) for end in _ENDS)


def mean_squared_scale(file: GGUFFile, tensor: TensorInfo) -> float:
    """Return by how much the squares of the tensor's weights are larger than those stored.

    That is the mean over experts. Scales that are none (not F32, not finite) count as 1.
    """
    name = tensor.name.removesuffix(".weight") + _ENDS[0]
    if not tensor.name.endswith(".weight") or not file.has_tensor(name):
        return 1.0
    scale = file.tensor(name)
    if scale.type_name != "F32" or scale.n_weights not in (1, *tensor.shape[2:3]):
        return 1.0
    values = file.read_rows(scale, 0, scale.n_rows).view("<f4").astype(np.float64)
    found = float(np.mean(values**2))
    return found if np.isfinite(found) else 1.0
