"""Measurements made up from rules, for tests that need no model."""

import math

import numpy as np

from ramgguf.gguf.identity import Source
from ramgguf.measure.result import Measurement, Point, TensorMeasurement

BPW = {
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "Q4_0": 4.5,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
}
SOURCE = Source(
    path="model-f16.gguf",
    n_bytes=10**9,
    header_sha256="0" * 64,
    architecture="llama",
    name="made up",
)


def tensor(
    name: str, shape: tuple[int, ...], role: str, layer: int | None, rng: np.random.Generator
) -> TensorMeasurement:
    """Return a quantizable F16 tensor whose NMSE falls by 6 dB a bit, give or take."""
    n = math.prod(shape)
    points = [
        Point(
            format=f,
            n_bytes=int(n * bpw / 8),
            nmse=0.8 * 4.0**-bpw * float(rng.uniform(0.8, 1.2)) * 16,
            max_error=0.1,
        )
        for f, bpw in BPW.items()
    ]
    points.append(Point(format="F16", n_bytes=2 * n, nmse=0.0, max_error=0.0))
    return TensorMeasurement(
        name=name,
        shape=shape,
        role=role,
        layer=layer,
        source_format="F16",
        n_bytes=2 * n,
        sum_squares=float(n),
        max_abs=1.0,
        excess_kurtosis=0.0,
        points=tuple(sorted(points, key=lambda p: p.n_bytes)),
    )


def norm(name: str, n: int, layer: int | None) -> TensorMeasurement:
    """Return an F32 tensor that is never quantized."""
    return TensorMeasurement(
        name=name,
        shape=(n,),
        role="norm",
        layer=layer,
        source_format="F32",
        n_bytes=4 * n,
        sum_squares=float(n),
        max_abs=1.0,
        excess_kurtosis=0.0,
        points=(Point(format="F32", n_bytes=4 * n, nmse=0.0, max_error=0.0),),
        kept="one-dimensional",
    )


def measurement(n_layers: int = 4, d: int = 256, seed: int = 0) -> Measurement:
    """Return the measurement of a small llama-like model."""
    rng = np.random.default_rng(seed)
    tensors = [tensor("token_embd.weight", (d, 8 * d), "tied_embedding", None, rng)]
    for i in range(n_layers):
        tensors.append(norm(f"blk.{i}.attn_norm.weight", d, i))
        for role, shape in {
            "attn_q": (d, d),
            "attn_k": (d, d // 2),
            "attn_v": (d, d // 2),
            "attn_output": (d, d),
            "ffn_gate": (d, 3 * d),
            "ffn_up": (d, 3 * d),
            "ffn_down": (3 * d, d),
        }.items():
            tensors.append(tensor(f"blk.{i}.{role}.weight", shape, role, i, rng))
    tensors.append(norm("output_norm.weight", d, None))
    return Measurement(
        ramgguf_version="0",
        source=SOURCE,
        encoder="rtn",
        formats=tuple(BPW),
        n_overhead_bytes=4096,
        alignment=32,
        n_layers=n_layers,
        tensors=tuple(tensors),
    )
