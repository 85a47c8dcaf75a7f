"""What an importance matrix has for a model: which matrices have an entry, and which have none."""

from dataclasses import dataclass

from ramgguf.core.errors import ImatrixError
from ramgguf.core.units import format_count
from ramgguf.gguf.architecture import is_multiplied, parse_name, same_columns
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.quants.imatrix import Imatrix


@dataclass(frozen=True)
class Coverage:
    """The model's matrices that are multiplied with activations, and those without an entry.

    shared names those that are weighed by the entry of another one that reads the same
    activations, alike those by one of latent attention whose input has the same columns. n_unused
    counts experts that saw no token, over n_unused_in tensors. no_hessian names matrices without a
    Hessian, None where there is no file of Hessians.
    """

    matrices: tuple[str, ...]
    missing: tuple[str, ...]
    shared: tuple[str, ...]
    alike: tuple[str, ...]
    n_unused: int
    n_unused_in: int
    no_hessian: tuple[str, ...] | None = None

    def notes(self) -> tuple[str, ...]:
        """Return what a reader of the result must know; nothing where all is covered."""
        found = []
        matrices = format_count(len(self.matrices), "matrix")
        if self.missing:
            found.append(
                f"the importance matrix has no entry for {len(self.missing)} of {matrices} "
                f"({_listed(self.missing)}): their errors are not weighed"
            )
        if self.shared:
            found.append(
                f"weighed by the entry of one that reads the same activations: {len(self.shared)} "
                f"of {matrices} ({_listed(self.shared)})"
            )
        if self.alike:
            found.append(
                "weighed by the entry of another factor of latent attention, whose input has the "
                f"same columns: {len(self.alike)} of {matrices} ({_listed(self.alike)})"
            )
        if self.n_unused:
            found.append(
                f"{format_count(self.n_unused, 'expert')} of "
                f"{format_count(self.n_unused_in, 'tensor')} saw no token when the matrix was "
                "made: each has the mean of its tensor's others"
            )
        if self.no_hessian:
            found.append(
                f"there is no Hessian for {len(self.no_hessian)} of {matrices} "
                f"({_listed(self.no_hessian)}): their errors are not those of the output"
            )
        return tuple(found)


def coverage(file: GGUFFile, imatrix: Imatrix | None) -> Coverage | None:
    """Return what the matrix has for the model; None without a matrix.

    Raises ImatrixError when it was made from another model, has an entry for none of this model's
    matrices, or one for other columns; and where one of the first two is so of the Hessians.
    """
    if imatrix is None:
        return None
    model, hessians = file.paths[0], imatrix.hessians
    for path, sample in (
        (imatrix.path, imatrix.model_sample),
        (hessians and hessians.path, hessians and hessians.model_sample),
    ):
        if sample not in (None, file.sample_sha256):
            raise ImatrixError(
                f"{path} was made from another model than {model} (its data differ); "
                "make it again: ramgguf calibrate"
            )
    tensors = [t for t in file.tensors if _is_multiplied(file, t)]
    entries = {t.name: imatrix.entry_for(t.name, t.shape) for t in tensors}
    for t in tensors:
        try:
            imatrix.importance(t.name, t.shape)
        except ImatrixError as e:
            raise ImatrixError(f"{e} The model is {model}") from None
    missing = tuple(name for name, entry in entries.items() if entry is None)
    if tensors and len(missing) == len(tensors):
        raise ImatrixError(
            f"{imatrix.path} has entries for {format_count(len(imatrix.entries), 'tensor')}, and "
            f"none of the {format_count(len(tensors), 'matrix')} of {model} is among them; it was "
            "made with another model"
        )
    others = {n: e.name for n, e in entries.items() if e is not None and e.name != n}
    unused = [e.n_unused for e in entries.values() if e is not None and e.n_unused]
    no_hessian = None
    if hessians is not None:
        dense = [t.name for t in tensors if len(t.shape) == 2]
        no_hessian = tuple(name for name in dense if hessians.owner(name) is None)
        if dense and len(no_hessian) == len(dense):
            raise ImatrixError(
                f"{hessians.path} has a Hessian for none of the "
                f"{format_count(len(dense), 'matrix')} of {model}; it was made with another model"
            )
    return Coverage(
        matrices=tuple(entries),
        missing=missing,
        shared=tuple(n for n, other in others.items() if other != same_columns(n)),
        alike=tuple(n for n, other in others.items() if other == same_columns(n)),
        n_unused=sum(unused),
        n_unused_in=len(unused),
        no_hessian=no_hessian,
    )


def coverage_notes(file: GGUFFile, imatrix: Imatrix | None) -> tuple[str, ...]:
    """Return the notes of the coverage, none without a matrix; raises as coverage does."""
    found = coverage(file, imatrix)
    return () if found is None else found.notes()


def _is_multiplied(file: GGUFFile, tensor: TensorInfo) -> bool:
    return is_multiplied(tensor.name, tensor.shape, file.architecture, tied=file.has_tied_embedding)


def _listed(names: tuple[str, ...]) -> str:
    """Return all names in short: output; attn_q, attn_k of layers 0–3, 7; ffn_up of layer 9."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = parse_name(name)
        of = layers.setdefault(f"{found.stack}{found.part}", [])
        if found.layer is not None:
            of.append(found.layer)
    parts: dict[tuple[int, ...], list[str]] = {}
    for part, of in layers.items():
        parts.setdefault(tuple(sorted(of)), []).append(part)
    return "; ".join(
        ", ".join(some) + (f" of layer{'s' * (len(of) > 1)} {_ranges(of)}" if of else "")
        for of, some in parts.items()
    )


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return sorted numbers as ranges: 0–3, 7."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
