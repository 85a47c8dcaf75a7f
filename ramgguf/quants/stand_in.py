"""A stand-in for a model: a quick quantization of itself (RTN), on which forward passes run.

What is measured by passes (tokens that the model draws, activations, sensitivities) changes little
when the weights are rounded to 8 bits. A stand-in has half the source's bytes or fewer, so it fits
where the source does not. Where that fits, a stand-in is no faster: with 64 tokens at a time a pass
waits for arithmetic, of which quantized weights take more (docs/speed.md).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.core.machine import Available, available_memory
from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.units import format_bytes
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import never_quantized
from ramgguf.gguf.header import string, u32
from ramgguf.gguf.layout import Layout, Overrides, plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.writer import rewrite
from ramgguf.quants import formats
from ramgguf.quants.roundtrip import SOURCES, Rows, stored

StandIn = Literal["auto", "none", "q8_0", "q6_k", "q4_k"]
STAND_INS: tuple[StandIn, ...] = get_args(StandIn)
# Sensitivities are read by 4-bit errors, against which the stand-in's own must be small.
FINE: tuple[StandIn, ...] = ("auto", "none", "q8_0", "q6_k")

# From the largest. A tensor gets the first of its formats whose blocks divide its rows.
_FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"Q8_0": ("Q8_0",), "Q6_K": ("Q6_K", "Q8_0"), "Q4_K": ("Q4_K", "Q4_0")}
)
_LARGEST_BF16_IN_F16 = 0x4700  # 32768, half of F16's largest: a format may make weights larger
# Of contexts and graphs, and of the processes themselves: 356 to 565 MB in bench/memory_limit.py.
BESIDE_BYTES = 640 << 20


@dataclass(frozen=True)
class ReadyStandIn:
    """A stand-in that is written already: its format, and its file."""

    form: str
    path: Path

    @property
    def choice(self) -> StandIn:
        """The word for its format."""
        return next(word for word in STAND_INS if word.upper() == self.form)


def chosen_stand_in(
    choice: StandIn,
    file: GGUFFile,
    *,
    beside: int = 0,
    allowed: Sequence[StandIn] = STAND_INS,
    announce: Callable[[str], None] = lambda _: None,
) -> str | None:
    """Return the format of the stand-in that passes over the model run on; None: on the model.

    auto takes the model where it fits the memory with `beside` bytes, else the largest of the
    allowed stand-ins that fits, else the smallest: its pages are then read again for every pass.
    announce gets what is taken for the model, and why. Raises EngineError for a choice that is
    none, or not allowed.
    """
    if choice not in STAND_INS:
        raise EngineError(f"stand-in {choice!r} is none of {', '.join(STAND_INS)}")
    if choice == "none":
        return None
    if choice != "auto":
        if choice not in allowed:
            raise EngineError(
                f"a stand-in in {choice.upper()} is too coarse to read sensitivities on; "
                f"take {', '.join(allowed)}"
            )
        return choice.upper()
    try:
        available = available_memory()
    except BudgetError:  # a system that does not tell
        return None
    forms = [f for f in _FORMATS if f.lower() in allowed]
    room = available.n_bytes - beside - BESIDE_BYTES
    if file.n_bytes <= room:
        return None
    sizes = {form: stand_in_layout(file, form, Path("stand-in")).n_bytes for form in forms}
    form = next((f for f in forms if sizes[f] <= room), forms[-1])
    announce(_why(file, form, sizes[form], available))
    return form


def _why(file: GGUFFile, form: str, n_bytes: int, available: Available) -> str:
    return (
        f"passes run on a stand-in in {form} of {format_bytes(n_bytes)}: the model takes "
        f"{format_bytes(file.n_bytes)}, and {format_bytes(available.n_bytes)} are available"
    )


def stored_type(tensor: TensorInfo, form: str) -> str:
    """Return the format that the tensor has in a stand-in of this format."""
    if tensor.type_name not in SOURCES or never_quantized(tensor.name, tensor.shape) is not None:
        return tensor.type_name
    fitting = (f for f in _FORMATS[form] if formats.suits(f, tensor.row_length))
    return next(fitting, tensor.type_name)


def types_for_passes(file: GGUFFile, form: str | None) -> dict[str, str]:
    """Return the formats of a copy of the model on which sensitivities are read.

    form is that of a stand-in, None for the model itself. Its matrices in BF16 are then taken as
    F16, which holds the same weights to 2⁻²⁵ where they fit it (fits_f16): kernels round inputs to
    the type of the weights, of which BF16 keeps 8 bits and F16 11.
    """
    if form is not None:
        return {t.name: stored_type(t, form) for t in file.tensors}

    def kept(tensor: TensorInfo) -> str:
        if tensor.type_name == "BF16" and never_quantized(tensor.name, tensor.shape) is None:
            return "F16"
        return tensor.type_name

    return {t.name: kept(t) for t in file.tensors}


def fits_f16(rows: Rows) -> bool:
    """Return whether no weight of these rows in BF16 is near F16's largest."""
    bits = rows.view(np.uint16)
    return bool((bits & 0x7FFF).max(initial=0) <= _LARGEST_BF16_IN_F16)


def stand_in_metadata(form: str) -> Overrides:
    """Return what a stand-in's metadata say instead of the source's."""
    return {
        "general.file_type": u32(formats.file_type(form)),
        "general.quantization_version": u32(formats.QUANTIZATION_VERSION),
        "ramgguf.version": string(__version__),
    }


def stand_in_layout(file: GGUFFile, form: str, path: Path) -> Layout:
    """Return where every byte of a stand-in goes: one file, whatever the source's shards."""
    types = {t.name: stored_type(t, form) for t in file.tensors}
    return plan_layout(path, file, types, stand_in_metadata(form))


def write_stand_in(
    file: GGUFFile, form: str, path: Path, *, threads: int, progress: Progress | None = None
) -> Path:
    """Write the model's stand-in of this format, and return its path.

    Raises GGUFError when it does not fit the disk.
    """
    layout = stand_in_layout(file, form, path)

    def convert(chunk: Chunk, rows: Rows) -> Rows:
        tensor = file.tensors[chunk.index]
        return stored(tensor, rows, layout.tensors[tensor.name].type_name)

    return rewrite(
        layout, file, convert, stage="stand-in", threads=threads, progress=progress or Silent()
    )


def store_rows(file: GGUFFile, tensor: TensorInfo, to: str, *, threads: int, out: Rows) -> None:
    """Put all rows of a tensor into `out`, as a stand-in has them in the format `to`."""

    def encode(chunk: Chunk) -> None:
        rows = file.read_rows(tensor, chunk.start, chunk.stop)
        out[chunk.start : chunk.stop] = stored(tensor, rows, to)

    for _ in map_chunks(encode, runs([tensor]), threads):
        pass
