"""A measurement of a made-up model, and plans that follow it."""

import numpy as np

from ramgguf.gguf.identity import Source
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.plan.result import Assignment, Constraints, Plan

# bits per weight of the formats' blocks
BPW = {
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "IQ4_XS": 4.25,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
    "Q8_0": 8.5,
    "F16": 16.0,
}
SHAPES = {
    "attn_q": (768, 768),
    "attn_k": (768, 256),
    "attn_v": (768, 256),
    "attn_output": (768, 768),
    "ffn_gate": (768, 2048),
    "ffn_up": (768, 2048),
    "ffn_down": (2048, 768),
}
SOURCE = Source(path="made.gguf", n_bytes=1000, header_sha256="made", architecture="llama")


def _tensor(
    name: str, role: str, layer: int | None, shape: tuple[int, int], seed: int
) -> TensorMeasurement:
    rng = np.random.default_rng(seed)
    n, scale = shape[0] * shape[1], float(np.exp(rng.normal(0, 0.3)))
    points = tuple(
        Point(
            format=f,
            n_bytes=int(n * bpw / 8),
            nmse=0.0 if f == "F16" else scale * 0.9 * 4 ** (-bpw) * float(rng.uniform(0.8, 1.2)),
            max_error=0.1,
        )
        for f, bpw in BPW.items()
    )
    return TensorMeasurement(
        name=name,
        shape=shape,
        role=role,
        layer=layer,
        source_format="F16",
        n_bytes=2 * n,
        sum_squares=float(n),
        max_abs=1.0,
        excess_kurtosis=0.5,
        points=points,
    )


def made_measurement(n_layers: int = 30) -> Measurement:
    tensors = [_tensor("token_embd.weight", "embedding", None, (768, 49152), 0)]
    for layer in range(n_layers):
        for k, (role, shape) in enumerate(SHAPES.items()):
            name = f"blk.{layer}.{role}.weight"
            tensors.append(_tensor(name, role, layer, shape, 10 * layer + k + 1))
    norm = tensors[1].model_copy(
        update={
            "name": "blk.0.attn_norm.weight",
            "role": "norm",
            "shape": (768,),
            "points": tensors[1].points[-1:],
            "kept": "one-dimensional",
        }
    )
    return Measurement(
        ramgguf_version="0.1.0",
        source=SOURCE,
        encoder="search",
        formats=tuple(BPW),
        n_overhead_bytes=1000,
        alignment=32,
        n_layers=n_layers,
        tensors=(*tensors, norm),
    )


def made_plan(measurement: Measurement, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    assignments = []
    for t in measurement.tensors:
        middle = 3 + 1.5 * (t.role in ("attn_v", "ffn_down")) + (t.layer in (0, 1, 29))
        k = int(np.clip(round(middle + rng.normal(0, 0.7)), 0, 6))
        point = t.points[0] if t.kept else t.points[k]
        assignments.append(
            Assignment(
                name=t.name,
                role=t.role,
                source_format="F16",
                format=point.format,
                n_weights=t.n_weights,
                n_bytes=point.n_bytes,
                nmse=point.nmse,
                cost=point.nmse * t.n_weights,
                note=t.kept,
            )
        )
    n_bytes = 1000 + sum(a.n_bytes for a in assignments)
    return Plan(
        ramgguf_version="0.1.0",
        source=SOURCE,
        encoder="search",
        objective="weighted",
        budget=n_bytes + 100,
        n_bytes=n_bytes,
        n_overhead_bytes=1000,
        total_cost=sum(a.cost for a in assignments),
        gap=0.0,
        constraints=Constraints(),
        assignments=tuple(assignments),
    )
