"""The bytes of an output for a fixed plan: they change only with a format, never with the code."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

import ramgguf
from gguf_samples import finish_gguf

FORMATS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "MXFP4"),
)
# sha256 of all tensors in order, as commit 697273b wrote them.
WRITTEN = {
    "rtn": "39f5f4219a9a00e1f43f589a5998a50da1a26e4782edc7e4103a2ec735785122",
    "search": "8e6f97a1636dd62f141a1d761660868fb632e791b53b36ae386d467acc5cb7ed",
}


def written(folder: Path, encoder: str) -> str:
    """Return the hash of what quantize writes for the fixed plan: one tensor in each format."""
    rng = np.random.default_rng(697)
    writer = GGUFWriter(folder / "m.gguf", "llama")
    writer.add_block_count(len(FORMATS))
    for i in range(len(FORMATS)):
        weights = rng.standard_normal((6, 512)) * rng.standard_normal((6, 1))
        writer.add_tensor(f"blk.{i}.ffn_down.weight", weights.astype(np.float16))
    finish_gguf(writer)
    pins = [rf"blk\.{i}\.={name}" for i, name in enumerate(FORMATS)]
    made = ramgguf.quantize(
        folder / "m.gguf", "1000%", folder / "out.gguf", pins=pins, formats=FORMATS,
        encoder=encoder, min_sqnr_db=-99, effort="fast",
    )  # fmt: skip
    found = hashlib.sha256()
    for t in GGUFReader(made.paths[0]).tensors:
        found.update(f"{t.name} {t.tensor_type.name}".encode())
        found.update(t.data.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("encoder", WRITTEN)
def test_a_fixed_plan_is_written_to_the_same_bytes_as_ever(tmp_path: Path, encoder: str) -> None:
    assert written(tmp_path, encoder) == WRITTEN[encoder]
