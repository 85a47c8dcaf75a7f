"""What was written, checked: decoded again and compared with the source and the plan."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ramgguf.core.errors import GGUFError
from ramgguf.core.parallel import Buffers, Chunk, Run, map_runs, runs
from ramgguf.core.progress import Progress
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.plan.result import Assignment, Plan
from ramgguf.quants import codec
from ramgguf.quants.codec import ErrorWeights, Piece, is_sampled, tensor_weights
from ramgguf.quants.row_samples import written_sample

# Errors are sums in the same order as those measured, so the two agree to the last bits.
NMSE_TOLERANCE = 1e-9


def verify(
    file: GGUFFile, plan: Plan, written: GGUFFile, *, threads: int, progress: Progress
) -> float:
    """Decode every tensor that was written and return the largest relative departure of its NMSE.

    Raises GGUFError naming the tensor when a format, a copied byte or an error differs from the
    plan's, or when the size is not the planned one.
    """
    # A plan of one file may be written as shards, which have headers of their own.
    if len(written.paths) == 1 and written.n_bytes != plan.n_bytes:
        raise GGUFError(
            f"{written.paths[0]} has {written.n_bytes} bytes, the plan {plan.n_bytes}; "
            "please report it"
        )
    compare, found = _compared(file, plan, written, threads=threads, progress=progress)
    for i, planned in enumerate(plan.assignments):
        if planned.format != planned.source_format and compare.is_sampled(i, planned):
            found[i] = _sampled_nmse(compare, i, found[i])
    return max(map(_departure, plan.assignments, found), default=0.0)


def with_written_errors(
    file: GGUFFile, plan: Plan, written: GGUFFile, *, threads: int, progress: Progress
) -> Plan:
    """Return the plan with the errors of what was written; those of formats that are measured on a
    sample of the rows stay. Raises GGUFError as verify does.
    """
    compare, found = _compared(file, plan, written, threads=threads, progress=progress)
    assignments = tuple(
        a
        if a.format == a.source_format or compare.is_sampled(i, a)
        else a.model_copy(update={"nmse": found[i]})
        for i, a in enumerate(plan.assignments)
    )
    return plan.model_copy(update={"assignments": assignments})


def _compared(
    file: GGUFFile, plan: Plan, written: GGUFFile, *, threads: int, progress: Progress
) -> tuple["_Comparison", list[float]]:
    """Return what compares, and each tensor's NMSE as it was written."""
    squared, total = [0.0] * len(file.tensors), [0.0] * len(file.tensors)
    compare = _Comparison(
        file, plan, written, tensor_weights(file, plan.imatrix, plan.encoded), Buffers()
    )
    progress.start("verify", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        for parts in map_runs(compare, runs(file.tensors), threads):
            for part in parts:
                squared[part.index] += part.squared_error
                total[part.index] += part.squares
            progress.advance(sum(part.n_bytes for part in parts))
    finally:
        progress.finish()
    nmse = [s / t if t else 0.0 for s, t in zip(squared, total, strict=True)]
    return compare, nmse


def _sampled_nmse(compared: "_Comparison", index: int, whole_nmse: float) -> float:
    """Return the NMSE of the rows that were measured; that of all rows must be of its kind."""
    tensor, scale = compared.file.tensors[index], compared.scales[index]
    found = written_sample(compared.file, tensor, scale, compared.written)
    if not whole_nmse <= 2 * found.nmse + 10 * found.standard_error:
        raise GGUFError(
            f"{tensor.name}: NMSE {whole_nmse:.3e} was written, {found.nmse:.3e} ± "
            f"{found.standard_error:.1e} was expected from a sample; please report it"
        )
    return found.nmse


def _departure(planned: Assignment, nmse: float) -> float:
    departure = abs(nmse - planned.nmse) / planned.nmse if planned.nmse else nmse
    if departure > NMSE_TOLERANCE:
        raise GGUFError(
            f"{planned.name}: NMSE {nmse:.6e} was written, {planned.nmse:.6e} was planned"
        )
    return departure


@dataclass(frozen=True, slots=True)
class _Compared:
    """What was compared of one chunk: source bytes, Σ(x−q)² and Σx², weighted by the importance."""

    index: int
    n_bytes: int
    squared_error: float
    squares: float


@dataclass(frozen=True)
class _Comparison:
    """The source and what was written of it, to be compared chunk by chunk."""

    file: GGUFFile
    plan: Plan
    written: GGUFFile
    scales: Sequence[ErrorWeights]
    buffers: Buffers

    def is_sampled(self, index: int, planned: Assignment) -> bool:
        """Return whether the planned error is that of a sample of the tensor's rows."""
        return is_sampled(planned.format, self.scales[index])

    def __call__(self, run: Run) -> list[_Compared]:
        targets = [self._target(chunk) for chunk in run]
        before, _ = self.file.read_ranges(
            [(self.file.tensors[c.index], c.start, c.stop) for c in run],
            partial(self.buffers.take, "before"),
        )
        after, _ = self.written.read_ranges(
            [(t, c.start, c.stop) for t, c in zip(targets, run, strict=True)],
            partial(self.buffers.take, "after"),
        )
        found, changed = [], []
        for i, (chunk, target) in enumerate(zip(run, targets, strict=True)):
            found.append(_Compared(chunk.index, before[i].nbytes, 0.0, 1.0))
            if target.type_name != self.file.tensors[chunk.index].type_name:
                changed.append(i)
            elif not np.array_equal(before[i], after[i]):
                raise GGUFError(f"{target.name} was to be copied, and its bytes differ")
        scales = [self.scales[run[i].index] for i in changed]
        stats = codec.compare(
            [
                Piece(scale, self.file.tensors[run[i].index].type_name, before[i], run[i].start)
                for i, scale in zip(changed, scales, strict=True)
            ],
            [targets[i].type_name for i in changed],
            [after[i] for i in changed],
        )
        for i, scale, s in zip(changed, scales, stats, strict=True):
            found[i] = _Compared(
                run[i].index, before[i].nbytes, scale.error(s.errors[0]), scale.squares(s)
            )
        return found

    def _target(self, chunk: Chunk) -> TensorInfo:
        planned, source = self.plan.assignments[chunk.index], self.file.tensors[chunk.index]
        target = self.written.tensor(planned.name)
        if target.type_name != planned.format or target.shape != source.shape:
            raise GGUFError(
                f"{planned.name} was written as {target.type_name} {target.shape}, "
                f"planned as {planned.format} {source.shape}"
            )
        return target
