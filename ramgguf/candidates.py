"""Which formats are tried for a tensor, and why others are not."""

from collections.abc import Sequence
from dataclasses import dataclass

from ramgguf import _core, formats, libggml
from ramgguf.errors import FormatError
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.imatrix import Imatrix
from ramgguf.weighing import Scale

# What rounding a block's d to F16 costs, at most: (2^-11)^2.
TERNARY_NMSE = 2.0**-22


@dataclass(frozen=True)
class Candidates:
    """The formats of a tensor: measured on all rows, or sampled; excluded says why others not."""

    measured: tuple[str, ...]
    sampled: tuple[str, ...]
    excluded: dict[str, str]


def tried(wanted: Sequence[str] | None, imatrix: Imatrix | None) -> tuple[str, ...]:
    """Return the names of the formats to try, by default those that suit what is there.

    Raises FormatError when one is wanted that needs an importance matrix and there is none, or
    that needs libggml and it is not installed.
    """
    if not wanted:
        extra = formats.with_importance() if imatrix and libggml.is_installed() else ()
        return (*formats.offered(), *extra)
    needing = [name for name in wanted if name in formats.with_importance()]
    if needing and imatrix is None:
        raise FormatError(
            f"{', '.join(needing)} cannot be encoded without an importance matrix; give one with "
            "--imatrix, or leave these formats out"
        )
    if needing:
        libggml.require()
    return tuple(wanted)


def suited(
    file: GGUFFile, tensor: TensorInfo, scale: Scale, names: Sequence[str], *, tell_ternary: bool
) -> Candidates:
    """Return those of the named formats that suit what the tensor holds and how it is weighed.

    tell_ternary: the formats for ternary weights were asked for, so it is told why they are none.
    """
    measured, sampled, excluded = [], [], {}
    ternary = any(name in formats.TERNARY for name in names) and _may_be_ternary(file, tensor)
    for name in names:
        if name in formats.TERNARY and not ternary:
            if tell_ternary:
                excluded[name] = "its weights are not ternary"
        elif formats.get(name).encodable:
            measured.append(name)
        elif scale.hessian is not None:
            # Its error would be another than that of the tensor's other formats.
            excluded[name] = "its errors are not known in terms of a Hessian"
        elif scale.importance is None:
            excluded[name] = "the importance matrix has no entry for it"
        else:
            sampled.append(name)
    return Candidates(tuple(measured), tuple(sampled), excluded)


def _may_be_ternary(file: GGUFFile, tensor: TensorInfo) -> bool:
    """Return whether the first row is; that is enough to leave nearly all models out."""
    stats = _core.measure(["TQ2_0"], tensor.type_name, file.read_rows(tensor, 0, 1))
    return stats.errors[0].sum_squared_error <= TERNARY_NMSE * stats.sum_squares
