"""Weights of tokens by the attention that they receive, for XᵀX of a layer's inputs.

An error at a token to which many others attend is an error in all of them. As in RSQ (Sung et al.
2025, arXiv 2503.01820): the attention paid to a token, summed over heads and queries, brought to
LEAST … 1 within the sequence and the layer; here their mean is then 1.
"""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.llama import ggml

Floats = NDArray[np.float32]

LEAST = 0.01  # docs/findings.md: which tokens count
MAX_TOKENS = 1024  # of a sequence whose attention is looked at: it takes 4 · n² bytes per head
_NODE = b"kq_soft_max-"  # what llama.cpp calls the attention of a layer, without flash attention


def attending_layer(name: bytes) -> int | None:
    """Return the layer whose attention a node of this name is; None where it is none."""
    number = name.removeprefix(_NODE)
    return int(number) if number != name and number.isdigit() else None


def received(node: Any) -> Floats | None:
    """Return the attention that each token receives: (tokens,); None where keys are no tokens.

    node is a softmax over the keys of a sequence that was decoded at once, from its start.
    """
    found = ggml.read_array(ctypes.pointer(node), np.float32)  # (1, heads, queries, keys)
    n = found.shape[2]
    if found.shape[0] != 1 or found.shape[3] < n or found[..., n:].any():
        return None
    total: Floats = found[..., :n].sum(axis=(0, 1, 2), dtype=np.float64).astype(np.float32)
    return total


def token_weights(attention: Floats) -> Floats:
    """Return the weights of tokens that receive this attention, (tokens,), of mean 1."""
    low, high = attention.min(), attention.max()
    if not high > low:
        return np.ones_like(attention)
    found = LEAST + (1 - LEAST) * (attention - low) / (high - low)
    weights: Floats = found / found.mean()
    return weights
