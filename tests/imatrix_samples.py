"""Importance matrices in both file formats, whole."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from gguf_samples import finish_gguf

Floats = NDArray[np.float32]


DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def write_gguf(path: Path, tensors: Mapping[str, Floats], *, kind: str | None = "imatrix") -> Path:
    writer = GGUFWriter(path, "llama")
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["wiki.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 12)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    finish_gguf(writer)
    return path


def sound_tensors() -> dict[str, Floats]:
    return {
        f"{DENSE}.in_sum2": floats(2, 4, 6, 8)[None],
        f"{DENSE}.counts": floats(2)[None],
        f"{EXPERTS}.in_sum2": floats(1, 2, 3, 0, 0, 0, 5, 10, 15).reshape(3, 3),
        f"{EXPERTS}.counts": floats(1, 0, 5)[:, None],
    }


def legacy_entry(name: str, calls: int, values: Floats) -> bytes:
    raw = name.encode()
    head = struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
    return head + values.tobytes()


def legacy(*entries: bytes, tail: bytes | None = None) -> bytes:
    if tail is None:
        tail = struct.pack("<ii", 7, 8) + b"wiki.txt"
    return struct.pack("<i", len(entries)) + b"".join(entries) + tail


def sound_legacy() -> bytes:
    return legacy(
        legacy_entry(DENSE, 2, floats(2, 4, 6, 8)), legacy_entry(EXPERTS, 1, floats(*range(6)))
    )
