"""From a Plan to a file, and back: writing what was planned and checking what was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import formats
from ramgguf.errors import FormatError, GGUFError, PlanError
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.gguf_layout import Layout, plan_layout
from ramgguf.gguf_values import Value, string, u32, u64
from ramgguf.gguf_write import GGUFOutput
from ramgguf.hub import HubFile
from ramgguf.imatrix import imatrix_keys, planned_imatrix
from ramgguf.parallel import Buffers, Chunk, batches, map_chunks
from ramgguf.progress import Progress
from ramgguf.sampling import written_sample
from ramgguf.schema import Assignment, ImportanceSource, Plan
from ramgguf.version import __version__
from ramgguf.weighing import Scale

# Errors are sums in the same order as those measured, so the two agree to the last bits.
NMSE_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Destination:
    """Where the output goes; split_max_bytes None writes one file."""

    path: Path
    force: bool = False
    split_max_bytes: int | None = None


def planned_metadata(
    plan: Plan | None, imatrix: ImportanceSource | None = None, hub: HubFile | None = None
) -> dict[str, Value]:
    """Return the metadata that the output has and the source has not, or has otherwise.

    imatrix and hub are those that a plan is to be made with, and from. Every value has a fixed
    length: without a plan, values stand in for what it will say, so the header's bytes are known
    before there is one.
    """
    by_format: dict[str, int] = {}
    for a in plan.assignments if plan else ():
        by_format[a.format] = by_format.get(a.format, 0) + a.n_bytes
    most = max(by_format, key=lambda name: by_format[name]) if by_format else "F32"
    unknown = "0" * 64
    weighed_with = plan.imatrix if plan else imatrix
    came_from = plan.source.hub if plan else hub
    return {
        "general.file_type": u32(formats.file_type(most)),
        "general.quantization_version": u32(formats.QUANTIZATION_VERSION),
        "ramgguf.version": string(__version__),
        "ramgguf.budget": u64(plan.budget if plan else 0),
        "ramgguf.plan_sha256": string(plan.sha256() if plan else unknown),
        "ramgguf.source_sha256": string((plan and plan.source.data_sha256) or unknown),
        **(_hub_keys(came_from) if came_from else {}),
        **(imatrix_keys(weighed_with) if weighed_with else {}),
    }


def _hub_keys(origin: HubFile) -> dict[str, Value]:
    """Return the metadata that say which file of the hub was quantized."""
    return {
        "ramgguf.source_repo": string(origin.repo),
        "ramgguf.source_revision": string(origin.revision),
        "ramgguf.source_file": string(origin.file),
    }


def planned_layout(file: GGUFFile, plan: Plan, destination: Destination) -> Layout:
    """Return where every byte of the planned output goes."""
    return plan_layout(
        destination.path,
        file,
        {a.name: a.format for a in plan.assignments},
        planned_metadata(plan),
        split_max_bytes=destination.split_max_bytes,
    )


def check_source(file: GGUFFile, plan: Plan) -> None:
    """Raise PlanError unless the plan was made for this model."""
    if (file.header_sha256, file.n_bytes) != (plan.source.header_sha256, plan.source.n_bytes):
        raise PlanError(
            f"the plan was made from {plan.source.path} ({plan.source.n_bytes} bytes), and "
            f"{file.paths[0]} ({file.n_bytes} bytes) is another model; plan again"
        )
    names = [t.name for t in file.tensors]
    if names != [a.name for a in plan.assignments]:
        raise PlanError(f"the plan's tensors are not those of {file.paths[0]}; plan again")


def begin(file: GGUFFile, plan: Plan, destination: Destination) -> GGUFOutput:
    """Return the planned output, which is to be written, verified and committed.

    It appears under its name only with commit. Raises PlanError when the plan is another model's,
    GGUFError when the output cannot be written.
    """
    check_source(file, plan)
    layout = planned_layout(file, plan, destination)
    return GGUFOutput(layout, file, force=destination.force)


def write(
    file: GGUFFile, plan: Plan, output: GGUFOutput, *, threads: int, progress: Progress
) -> None:
    """Encode every tensor into the output. Raises FormatError for weights that do not fit."""
    scales = _scales(file, plan)
    buffers = Buffers()

    def encode(chunk: Chunk) -> int:
        tensor, to = file.tensors[chunk.index], plan.assignments[chunk.index].format
        rows = _read(file, tensor, chunk, buffers, "source")
        blocks = rows
        if to != tensor.type_name:
            scale, length = scales[chunk.index], tensor.row_length
            out = buffers.take("blocks", len(rows) * formats.row_bytes(to, length))
            try:
                blocks = scale.encode(
                    to, tensor.type_name, rows, chunk.start, length, plan.encoder, out
                )
            except ValueError as e:
                raise FormatError(f"{tensor.name}: {e}") from None
        output.write_at(tensor.name, chunk.start * blocks.shape[1], blocks)
        return rows.nbytes

    progress.start("quantize", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        for n_bytes in map_chunks(encode, batches(file.tensors), threads):
            progress.advance(n_bytes)
    finally:
        progress.finish()


def _read(
    file: GGUFFile, tensor: TensorInfo, chunk: Chunk, buffers: Buffers, purpose: str
) -> NDArray[np.uint8]:
    n_bytes = (chunk.stop - chunk.start) * tensor.row_bytes
    return file.read_rows(tensor, chunk.start, chunk.stop, buffers.take(purpose, n_bytes))


def _scales(file: GGUFFile, plan: Plan) -> list[Scale]:
    """Return how every tensor's errors are weighed, as when the plan was made."""
    imatrix = planned_imatrix(plan.imatrix)
    return [
        Scale.of(t, imatrix if a.format != a.source_format else None)
        for t, a in zip(file.tensors, plan.assignments, strict=True)
    ]


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
    squared, total = [0.0] * len(file.tensors), [0.0] * len(file.tensors)
    compare = _Comparison(file, plan, written, _scales(file, plan), Buffers())
    progress.start("verify", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        for part in map_chunks(compare, batches(file.tensors), threads):
            squared[part.index] += part.squared_error
            total[part.index] += part.squares
            progress.advance(part.n_bytes)
    finally:
        progress.finish()
    for i, planned in enumerate(plan.assignments):
        if planned.format != planned.source_format and not formats.get(planned.format).encodable:
            whole = squared[i] / total[i] if total[i] else 0.0
            squared[i], total[i] = _sampled_nmse(compare, i, whole), 1.0
    return max(map(_departure, plan.assignments, squared, total), default=0.0)


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


def _departure(planned: Assignment, squared_error: float, squares: float) -> float:
    nmse = squared_error / squares if squares else 0.0
    departure = abs(nmse - planned.nmse) / planned.nmse if planned.nmse else nmse
    if departure > NMSE_TOLERANCE:
        raise GGUFError(
            f"{planned.name}: NMSE {nmse:.6e} was written, {planned.nmse:.6e} was planned"
        )
    return departure


@dataclass(frozen=True, slots=True)
class _Compared:
    """What was compared of one chunk: source bytes, Σ(x−q)² and Σx², weighed by the scale."""

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
    scales: Sequence[Scale]
    buffers: Buffers

    def __call__(self, chunk: Chunk) -> _Compared:
        planned, source = self.plan.assignments[chunk.index], self.file.tensors[chunk.index]
        target, scale = self.written.tensor(planned.name), self.scales[chunk.index]
        if target.type_name != planned.format or target.shape != source.shape:
            raise GGUFError(
                f"{planned.name} was written as {target.type_name} {target.shape}, "
                f"planned as {planned.format} {source.shape}"
            )
        before = _read(self.file, source, chunk, self.buffers, "before")
        after = _read(self.written, target, chunk, self.buffers, "after")
        if source.type_name == target.type_name:
            if not np.array_equal(before, after):
                raise GGUFError(f"{planned.name} was to be copied, and its bytes differ")
            return _Compared(chunk.index, before.nbytes, 0.0, 1.0)
        stats = scale.compare(source.type_name, before, target.type_name, after, chunk.start)
        return _Compared(
            chunk.index, before.nbytes, scale.error(stats.errors[0]), scale.squares(stats)
        )
