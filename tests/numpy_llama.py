"""A forward pass in NumPy of small models of the llama and qwen3moe architectures.

It is written from the papers' formulas, shares nothing with the package, and remembers what every
weight is multiplied with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass
class Forward:
    """One pass over a sequence; inputs are rows by weight, for experts by weight and number."""

    path: Path
    n_heads: int
    n_kv_heads: int
    neox: bool = False
    n_chosen: int = 0
    inputs: dict[str, Floats] = field(default_factory=dict)
    expert_inputs: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = GGUFReader(self.path).tensors
        self._w: Mapping[str, Floats] = {t.name: t.data.astype(np.float64) for t in tensors}

    def logits(self, ids: NDArray[np.int32]) -> Floats:
        """Return the logits (tokens, vocabulary), and fill inputs."""
        x = self._w["token_embd.weight"][ids]
        layer = 0
        while f"blk.{layer}.attn_norm.weight" in self._w:
            block = f"blk.{layer}."
            x = x + self._attention(block, self._normed(x, block + "attn_norm"))
            feed_forward = self._experts if self.n_chosen else self._dense
            x = x + feed_forward(block, self._normed(x, block + "ffn_norm"))
            layer += 1
        head = "output" if "output.weight" in self._w else "token_embd"
        return self._times(head, self._normed(x, "output_norm"))

    def _normed(self, x: Floats, name: str) -> Floats:
        scale = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
        normed: Floats = x / scale * self._w[name + ".weight"]
        return normed

    def _times(self, name: str, x: Floats) -> Floats:
        self.inputs[name + ".weight"] = x.reshape(-1, x.shape[-1])
        product: Floats = x @ self._w[name + ".weight"].T
        return product

    def _rotated(self, x: Floats) -> Floats:
        """Rotate x (tokens, heads, size) by position: pairs lie side by side, or a half apart."""
        n_tokens, _, size = x.shape
        angle = np.arange(n_tokens)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        out = np.empty_like(x)
        half = size // 2
        a, b = (slice(0, half), slice(half, None)) if self.neox else (slice(0, None, 2),) * 2
        if not self.neox:
            b = slice(1, None, 2)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., a] * sin + x[..., b] * cos
        return out

    def _attention(self, block: str, x: Floats) -> Floats:
        n_tokens = len(x)
        q = self._times(block + "attn_q", x).reshape(n_tokens, self.n_heads, -1)
        k = self._times(block + "attn_k", x).reshape(n_tokens, self.n_kv_heads, -1)
        v = self._times(block + "attn_v", x).reshape(n_tokens, self.n_kv_heads, -1)
        if block + "attn_q_norm.weight" in self._w:
            q = self._normed(q, block + "attn_q_norm")
            k = self._normed(k, block + "attn_k_norm")
        q, k = self._rotated(q), self._rotated(k)
        share = self.n_heads // self.n_kv_heads
        k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores += np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", p, v).reshape(n_tokens, -1)
        return self._times(block + "attn_output", mixed)

    def _dense(self, block: str, x: Floats) -> Floats:
        gate = self._times(block + "ffn_gate", x)
        up = self._times(block + "ffn_up", x)
        return self._times(block + "ffn_down", gate / (1 + np.exp(-gate)) * up)

    def _experts(self, block: str, x: Floats) -> Floats:
        scores = self._times(block + "ffn_gate_inp", x)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        chosen = np.argsort(-p, axis=-1)[:, : self.n_chosen]
        share = np.take_along_axis(p, chosen, axis=-1)
        share /= share.sum(axis=-1, keepdims=True)
        out = np.zeros_like(x)
        for expert in range(p.shape[-1]):
            tokens, slots = np.nonzero(chosen == expert)
            weights = {n: self._w[f"{block}ffn_{n}_exps.weight"] for n in ("gate", "up", "down")}
            mine = x[tokens]
            gate, up = mine @ weights["gate"][expert].T, mine @ weights["up"][expert].T
            hidden = gate / (1 + np.exp(-gate)) * up
            for name, seen in (("gate", mine), ("up", mine), ("down", hidden)):
                self.expert_inputs[f"{block}ffn_{name}_exps.weight", expert] = seen
            out[tokens] += share[tokens, slots, None] * (hidden @ weights["down"][expert].T)
        return out
