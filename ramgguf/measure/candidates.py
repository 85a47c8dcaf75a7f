"""Which formats are tried for a tensor, and why others are not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ramgguf import _core
from ramgguf.core.errors import FormatError
from ramgguf.core.gc_paused import gc_paused
from ramgguf.gguf.architecture import HEAD, never_quantized
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.weight_scale import has_scale
from ramgguf.quants import formats
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders import libggml
from ramgguf.quants.encoders.decoding import readable
from ramgguf.quants.grids import GRIDS, grid_of
from ramgguf.quants.imatrix import Imatrix

# What rounding a block's d to F16 costs, at most: (2^-11)^2.
TERNARY_NMSE = 2.0**-22


def is_source(type_name: str) -> bool:
    """Return whether weights in this type can be decoded here, by the core or by libggml."""
    if type_name not in formats.known():
        return False
    return formats.get(type_name).encodable or libggml.decodes(type_name)


@dataclass(frozen=True)
class Job:
    """A tensor with its candidates and importance; `kept` says why it has no candidates.

    sampled are candidates that are measured on a sample of the rows only. grid is the format on
    whose grid the weights lie.
    """

    tensor: TensorInfo
    scale: ErrorWeights
    candidates: tuple[str, ...]
    sampled: tuple[str, ...]
    excluded: dict[str, str]
    kept: str | None
    grid: str | None = None


@dataclass(frozen=True)
class Candidates:
    """The formats of a tensor: measured on all rows, or sampled; excluded says why others not."""

    measured: tuple[str, ...]
    sampled: tuple[str, ...]
    excluded: dict[str, str]


def tried(wanted: Sequence[str] | None, imatrix: Imatrix | None) -> tuple[str, ...]:
    """Return the names of the formats to try, by default those that suit what is there.

    With Hessians libggml's formats, IQ1_S and IQ1_M, are tried by name only: their errors then
    take all rows.

    Raises FormatError when one is wanted that needs an importance matrix and there is none, that
    needs libggml and it is not installed or lacks it, or that is a source only.
    """
    if not wanted:
        plain = imatrix is not None and imatrix.hessians is None
        extra = formats.with_importance() if plain and libggml.is_installed() else ()
        return (*formats.offered(), *formats.HALVES, *extra)
    if only := [name for name in wanted if name in formats.SOURCES_ONLY]:
        raise FormatError(
            f"{', '.join(only)} is a source only (--allow-requantize): the scale that each tensor "
            "needs lies in a tensor of its own, which is not written here; MXFP4, IQ4_XS and Q4_K "
            "are of its size"
        )
    needing = [name for name in wanted if name in formats.with_importance()]
    if needing and imatrix is None:
        raise FormatError(
            f"{', '.join(needing)} cannot be encoded without an importance matrix; give one with "
            "--imatrix, or leave these formats out"
        )
    for name in wanted:
        if name in formats.by_libggml():
            libggml.require(name)
    return tuple(wanted)


def suited(
    file: GGUFFile,
    tensor: TensorInfo,
    scale: ErrorWeights,
    names: Sequence[str],
    *,
    tell_ternary: bool,
) -> Candidates:
    """Return those of the named formats that suit the tensor's values and its error weights.

    tell_ternary: the ternary formats were requested, so the note says why they do not suit.
    """
    ternary = any(name in names for name in formats.TERNARY) and _may_be_ternary(file, tensor)
    weighed = scale.importance is not None
    return _suited(tuple(names), ternary, tell_ternary, weighed, scale.hessian is not None)


@cache
def _suited(
    names: tuple[str, ...], ternary: bool, tell_ternary: bool, weighed: bool, has_hessian: bool
) -> Candidates:
    measured, sampled, excluded = [], [], {}
    for name in names:
        if name in formats.TERNARY and not ternary:
            if tell_ternary:
                excluded[name] = "its weights are not ternary"
        elif formats.get(name).encodable or has_hessian:
            measured.append(name)
        elif name in formats.with_importance() and not weighed:
            excluded[name] = "the importance matrix has no entry for it"
        else:
            sampled.append(name)
    return Candidates(tuple(measured), tuple(sampled), excluded)


def _may_be_ternary(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether the first row is; that is enough to leave nearly all models out."""
    stats = _core.measure(["TQ2_0"], *readable(tensor.type_name, file.read_rows(tensor, 0, 1)))
    return stats.errors[0].sum_squared_error <= TERNARY_NMSE * stats.sum_squares


@dataclass(frozen=True)
class _Suiting:
    """The smaller formats that rows of a kind suit, those of the same bytes that hold them about
    as well, and why others do not.
    """

    smaller: tuple[str, ...]
    alike: tuple[str, ...]
    excluded: dict[str, str]


def _suiting(type_name: str, row_length: int, row_bytes: int, wanted: Sequence[str]) -> _Suiting:
    smaller, alike, excluded = [], [], {}
    if not formats.any_suits(wanted, row_length):
        wanted = (*wanted, *formats.HALVES)
    for name in wanted:
        if name == type_name:
            continue
        if not formats.suits(name, row_length):
            block = formats.get(name).block_size
            excluded[name] = f"rows of {row_length} are no multiple of {block}"
        elif formats.row_bytes(name, row_length) < row_bytes:
            smaller.append(name)
        elif {name, type_name} == set(formats.HALVES):
            alike.append(name)
    return _Suiting(tuple(smaller), tuple(alike), excluded)


@gc_paused()
def jobs_of(
    file: GGUFFile,
    wanted: Sequence[str],
    imatrix: Imatrix | None,
    allow_requantize: bool,
    *,
    tell_ternary: bool,
) -> list[Job]:
    found: dict[tuple[str, int], _Suiting] = {}  # a model has few kinds of rows
    # Formats that were asked for are all that there are; else a grid is one more.
    grids = [name for name in GRIDS if name in wanted or not tell_ternary]
    jobs = []
    for tensor in file.tensors:
        kept = _reason_to_keep(file, tensor, allow_requantize)
        if kept is not None:
            jobs.append(Job(tensor, ErrorWeights.of(tensor, None), (), (), {}, kept))
            continue
        kind = (tensor.type_name, tensor.row_length)
        if kind not in found:
            found[kind] = _suiting(*kind, tensor.row_bytes, wanted)
        suiting = found[kind]
        kept = None if suiting.smaller else "no smaller format suits its rows"
        names = (*suiting.smaller, *suiting.alike) if suiting.smaller else ()
        scale = ErrorWeights.of(tensor, imatrix if names else None)
        split = suited(file, tensor, scale, names, tell_ternary=tell_ternary)
        excluded = suiting.excluded | split.excluded
        grid = grid_of(file, tensor, grids)
        measured = tuple(n for n in split.measured if n != grid)
        kept = None if grid else kept
        jobs.append(Job(tensor, scale, measured, split.sampled, excluded, kept, grid))
    return jobs


def restricted(job: Job, only: frozenset[str] | None) -> Job:
    if only is None:
        return job
    return replace(
        job,
        candidates=tuple(name for name in job.candidates if name in only),
        sampled=tuple(name for name in job.sampled if name in only),
    )


def _reason_to_keep(file: GGUFFile, tensor: TensorInfo, allow_requantize: bool) -> str | None:
    kept = never_quantized(tensor.name, tensor.shape, file.architecture)
    if kept is not None or tensor.type_name in formats.FLOAT_FORMATS:
        return kept
    if not is_source(tensor.type_name):
        return f"copied: {tensor.type_name} is no source for quantization"
    if tensor.name == HEAD and has_scale(file, tensor):
        return f"copied: llama.cpp reads the scale of {HEAD} with {tensor.type_name} only"
    if not allow_requantize:
        return f"already quantized to {tensor.type_name} (--allow-requantize takes it as a source)"
    return None
