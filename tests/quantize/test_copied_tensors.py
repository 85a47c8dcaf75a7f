"""Tensors that come out as in a file that was made before are copied from it, and only those."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from ramgguf.quantize.pipeline import Quantized, QuantizeOptions, quantize_once
from tiny_models import write_tiny_model

PIN = r"^blk\.1\.ffn_up\.weight$=Q4_0"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny-f16.gguf", weight_type="F16")


def _made(model: Path, name: str, options: QuantizeOptions) -> Quantized:
    return quantize_once(model, "50%", model.with_name(name), replace(options, verify=False))


def _spoiled(made: Quantized) -> Quantized:
    """Flip all bits of the file's encoded tensors, to see which are taken from it."""
    reader = GGUFReader(made.paths[0], "r+")
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in ("F32", "F16"):
            tensor.data[:] = np.invert(tensor.data)
    reader.data.flush()
    return made


def _tensors(made: Quantized) -> dict[str, tuple[str, bytes]]:
    return {
        t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(made.paths[0]).tensors
    }


def test_a_file_with_copied_tensors_is_the_file_that_is_encoded_anew(model: Path) -> None:
    first = _made(model, "first.gguf", QuantizeOptions())
    options = QuantizeOptions(plan={"pins": (PIN,)})
    anew = _made(model, "anew.gguf", options)
    copied = _made(model, "copied.gguf", replace(options, before=first))
    assert anew.paths[0].read_bytes() == copied.paths[0].read_bytes()
    assert anew.plan.assignments == copied.plan.assignments
    assert _tensors(first) != _tensors(anew)


def test_only_tensors_of_the_same_format_are_copied(model: Path) -> None:
    first = _made(model, "first.gguf", QuantizeOptions())
    options = QuantizeOptions(plan={"pins": (PIN,)})
    anew = _tensors(_made(model, "anew.gguf", options))
    before = _spoiled(first)
    spoiled = _tensors(before)
    found = _tensors(_made(model, "copied.gguf", replace(options, before=before)))
    same = {name for name in anew if anew[name][0] == spoiled[name][0]}
    assert {name for name in anew if found[name] == spoiled[name]} == same
    assert {name for name in anew if found[name] == anew[name]} >= set(anew) - same
    assert "blk.1.ffn_up.weight" not in same


def test_nothing_is_copied_from_a_file_of_another_encoder(model: Path) -> None:
    before = _spoiled(_made(model, "first.gguf", QuantizeOptions(encoder="rtn")))
    options = QuantizeOptions()
    anew = _tensors(_made(model, "anew.gguf", options))
    assert _tensors(_made(model, "copied.gguf", replace(options, before=before))) == anew
