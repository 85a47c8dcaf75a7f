"""A stand-in for a model: a quick quantization of itself (RTN), on which forward passes run.

What is measured by passes (tokens that the model draws, activations, sensitivities) changes little
when the weights are rounded to 8 bits. A stand-in has half the source's bytes or fewer, so it fits
where the source does not, and a pass that waits for memory is faster on it.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import never_quantized
from ramgguf.gguf.header import string, u32
from ramgguf.gguf.layout import Layout, plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.writer import GGUFOutput
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.roundtrip import SOURCES

StandIn = Literal["auto", "none", "q8_0", "q6_k", "q4_k"]
STAND_INS: tuple[StandIn, ...] = get_args(StandIn)

# From the largest: a tensor gets the first format of its row whose blocks divide its rows.
_FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"Q8_0": ("Q8_0",), "Q6_K": ("Q6_K", "Q8_0"), "Q4_K": ("Q4_K", "Q4_0")}
)
_ENCODER = "rtn"


def stand_in_format(choice: str) -> str | None:
    """Return the format that an option's word names; None for none. auto is not resolved here.

    Raises EngineError for a word that is none of STAND_INS.
    """
    if choice not in STAND_INS or choice == "auto":
        raise EngineError(f"stand-in {choice!r} is none of {', '.join(STAND_INS)}")
    return None if choice == "none" else choice.upper()


def stored_type(tensor: TensorInfo, form: str | None, architecture: str = "") -> str:
    """Return the format that the tensor has in a stand-in of this format (None: no stand-in)."""
    if form is None or tensor.type_name not in SOURCES:
        return tensor.type_name
    if never_quantized(tensor.name, tensor.shape, architecture) is not None:
        return tensor.type_name
    fitting = (f for f in _FORMATS[form] if formats.suits(f, tensor.row_length))
    return next(fitting, tensor.type_name)


def stand_in_layout(file: GGUFFile, form: str, path: Path) -> Layout:
    """Return where every byte of a stand-in goes: one file, whatever the source's shards."""
    types = {t.name: stored_type(t, form, file.architecture) for t in file.tensors}
    overrides = {
        "general.file_type": u32(formats.file_type(form)),
        "general.quantization_version": u32(formats.QUANTIZATION_VERSION),
        "ramgguf.version": string(__version__),
    }
    return plan_layout(path, file, types, overrides)


def write_stand_in(file: GGUFFile, form: str, folder: Path, *, threads: int) -> Path:
    """Write the model's stand-in of this format into the folder, and return its path.

    Raises GGUFError when it does not fit the disk, FormatError for weights that are not finite.
    """
    layout = stand_in_layout(file, form, folder / f"stand-in-{form}.gguf")

    def encode(chunk: Chunk) -> None:
        tensor = file.tensors[chunk.index]
        rows = file.read_rows(tensor, chunk.start, chunk.stop)
        data = encoded(tensor, rows, chunk.start, layout.tensors[tensor.name].type_name)
        output.write_at(tensor.name, chunk.start * data.shape[1], data)

    with GGUFOutput(layout, file, force=False) as output:
        for _ in map_chunks(encode, runs(file.tensors), threads):
            pass
        return output.commit()[0]


def encoded(
    tensor: TensorInfo, rows: np.ndarray[tuple[int, int], np.dtype[np.uint8]], start: int, to: str
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return rows of the tensor, uint8 (rows, bytes), from row `start` on, as a stand-in's."""
    if to == tensor.type_name:
        return rows
    scale = ErrorWeights(None, tensor.n_rows)
    return scale.encode(to, tensor.type_name, rows, start, tensor.row_length, _ENCODER)
