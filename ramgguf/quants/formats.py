"""The block formats of the core and of libggml, and what ggml and llama.cpp call them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType

from ramgguf import _core
from ramgguf._core import BlockFormat
from ramgguf.core.errors import FormatError


@dataclass(frozen=True, slots=True)
class LibggmlFormat:
    """A block format that the core does not know; libggml decodes it, and may encode it."""

    name: str
    type_id: int
    block_size: int
    block_bytes: int
    encodable: bool = False  # by the core's kernels

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8.0 * self.block_bytes / self.block_size


Format = BlockFormat | LibggmlFormat

# What weights come in that nobody has quantized; llama.cpp computes with them as they are.
FLOAT_FORMATS = ("F32", "F16", "BF16")

# Sizes as in ggml-common.h of ggml 0.25. NVFP4: four UE4M3 scales, each of 16 E2M1 codes. Q1_0: an
# F16 d and a sign for each weight, for models that were trained so; NMSE on Gaussian weights 0.36.
_LIBGGML = (LibggmlFormat("NVFP4", 40, 64, 36), LibggmlFormat("Q1_0", 41, 128, 18))
# Decoded only. UE4M3 has its three bits from 2^-6 on, and the weights of most blocks are smaller
# than 6 of that: they need a scale for the tensor, which lies in a tensor of its own.
SOURCES_ONLY = ("NVFP4",)

# The layouts that block formats have had since ggml's quantization version 2 (GGML_QNT_VERSION).
QUANTIZATION_VERSION = 2

# `general.file_type` (enum llama_ftype of llama.h) of a model that is mostly of one format.
# K-quants take the _M variety, which llama.cpp means by the plain name.
_FILE_TYPES = MappingProxyType(
    {
        "F32": 0,
        "F16": 1,
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q2_K": 10,
        "Q3_K": 12,
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
        "IQ2_XXS": 19,
        "IQ2_XS": 20,
        "IQ3_XXS": 23,
        "IQ1_S": 24,
        "IQ4_NL": 25,
        "IQ3_S": 26,
        "IQ2_S": 28,
        "IQ4_XS": 30,
        "IQ1_M": 31,
        "BF16": 32,
        "TQ1_0": 36,
        "TQ2_0": 37,
        "MXFP4": 38,
        "NVFP4": 39,
        "Q1_0": 40,
        "Q2_0": 41,
    }
)

# Half of F32's bytes: for rows that suit no block, where llama-quantize takes F16, and for pins.
HALVES = ("F16", "BF16")

# Exact for models trained with weights of -d, 0 and d; for others the least accurate.
TERNARY = ("TQ1_0", "TQ2_0")
# Only when asked for by name. MXFP4 has twice the error of IQ4_XS at the same size; Q2_0 is so
# young that most installed copies of llama.cpp and of the gguf package refuse it.
ON_REQUEST = ("MXFP4", "Q2_0")


@cache
def _by_name() -> MappingProxyType[str, Format]:
    every: list[Format] = [*_core.formats(), *_LIBGGML]
    return MappingProxyType({f.name: f for f in sorted(every, key=lambda f: f.type_id)})


def known() -> frozenset[str]:
    """Return the names of all block formats that can be decoded, some by libggml only."""
    return frozenset(_by_name())


def names() -> tuple[str, ...]:
    """Return the names of the formats that the core has kernels for, in the order of ggml's ids."""
    return tuple(f.name for f in _by_name().values() if f.encodable)


def quantized() -> tuple[str, ...]:
    """Return the names of those that quantize: blocks of more than one weight."""
    return tuple(n for n in names() if _by_name()[n].block_size > 1)


def offered() -> tuple[str, ...]:
    """Return the names of those that are tried unless others are asked for."""
    return tuple(n for n in quantized() if n not in ON_REQUEST)


def with_importance() -> tuple[str, ...]:
    """Return the names of the formats that need an importance matrix and libggml."""
    return tuple(n for n in by_libggml() if weighs_columns(n))


def weighs_columns(name: str) -> bool:
    """Return whether libggml's encoder of the format takes notice of an importance matrix."""
    return all(f.name != name for f in _LIBGGML)


def by_libggml() -> tuple[str, ...]:
    """Return the names of the formats that libggml decodes, and encodes but for SOURCES_ONLY."""
    return tuple(f.name for f in _by_name().values() if not f.encodable)


def get(name: str) -> Format:
    """Return the format of this name; raises FormatError that lists the known ones."""
    try:
        return _by_name()[name]
    except KeyError:
        raise FormatError(
            f"format {name!r} is unknown; known are {', '.join(_by_name())}"
        ) from None


def suits(name: str, row_length: int) -> bool:
    """Return whether rows of row_length weights are whole blocks of the format."""
    return row_length % get(name).block_size == 0


@lru_cache(maxsize=4096)
def row_bytes(name: str, row_length: int) -> int:
    """Return the bytes of a row; raises FormatError when it is not made of whole blocks."""
    f = get(name)
    if row_length % f.block_size:
        raise FormatError(
            f"{name} has blocks of {f.block_size} weights, which rows of {row_length} are no "
            "multiple of; choose a format with smaller blocks"
        )
    return row_length // f.block_size * f.block_bytes


def any_suits(names: Iterable[str], row_length: int) -> bool:
    """Return whether rows of row_length weights are whole blocks of one of the formats."""
    return any(suits(name, row_length) for name in names)


def row_weights(name: str, n_bytes: int) -> int:
    """Return the weights of a row of n_bytes."""
    f = get(name)
    return n_bytes // f.block_bytes * f.block_size


def file_type(name: str) -> int:
    """Return `general.file_type` for a model whose bytes are mostly of this format."""
    return _FILE_TYPES[get(name).name]


# cpu-fast, from bench/results/format_speed.jsonl: at a prompt at least 75 % as fast as the fastest
# format, and at generation at least 85 % as fast as the fastest of no fewer bits per weight.
SETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu-fast": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL"),
        "k": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        "linear": (
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
            *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        ),
    }
)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return the formats in upper case, each set in its formats' place, none twice."""
    found: dict[str, None] = {}
    for name in names:
        for member in SETS.get(name.lower(), (name.upper(),)):
            found[member] = None
    return tuple(found)
