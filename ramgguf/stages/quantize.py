"""From a Plan to a file, and back: writing what was planned and checking what was written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import formats
from ramgguf.errors import FormatError, GGUFError, PlanError
from ramgguf.gguf_io import GGUFFile, TensorInfo, open_gguf
from ramgguf.gguf_layout import Layout, plan_layout
from ramgguf.gguf_values import Value, string, u32, u64
from ramgguf.gguf_write import GGUFOutput
from ramgguf.imatrix import imatrix_keys, planned_imatrix
from ramgguf.parallel import Chunk, ordered_map, row_chunks
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
    plan: Plan | None, imatrix: ImportanceSource | None = None
) -> dict[str, Value]:
    """Return the metadata that the output has and the source has not, or has otherwise.

    imatrix is the one that a plan is to be made with. Every value has a fixed length: without a
    plan, values stand in for what it will say, so the header's bytes are known before there is one.
    """
    by_format: dict[str, int] = {}
    for a in plan.assignments if plan else ():
        by_format[a.format] = by_format.get(a.format, 0) + a.n_bytes
    most = max(by_format, key=lambda name: by_format[name]) if by_format else "F32"
    unknown = "0" * 64
    weighed_with = plan.imatrix if plan else imatrix
    return {
        "general.file_type": u32(formats.file_type(most)),
        "general.quantization_version": u32(formats.QUANTIZATION_VERSION),
        "ramgguf.version": string(__version__),
        "ramgguf.budget": u64(plan.budget if plan else 0),
        "ramgguf.plan_sha256": string(plan.sha256() if plan else unknown),
        "ramgguf.source_sha256": string((plan and plan.source.data_sha256) or unknown),
        **(imatrix_keys(weighed_with) if weighed_with else {}),
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


def quantize(
    file: GGUFFile, plan: Plan, destination: Destination, *, threads: int, progress: Progress
) -> tuple[Path, ...]:
    """Write the planned file and return its paths (several when split).

    The output appears under its name only when it is complete and flushed. Raises PlanError when
    the plan is another model's, GGUFError when the output cannot be written.
    """
    check_source(file, plan)
    layout = planned_layout(file, plan, destination)
    scales = _scales(file, plan)
    output = GGUFOutput(layout, file, force=destination.force)
    progress.start("quantize", sum(t.n_bytes for t in file.tensors), "bytes")

    def write(chunk: Chunk) -> int:
        tensor, to = file.tensors[chunk.index], plan.assignments[chunk.index].format
        rows = file.read_rows(tensor, chunk.start, chunk.stop)
        blocks = _encoded(rows, chunk.start, tensor, scales[chunk.index], to, plan.encoder)
        output.write_at(tensor.name, chunk.start * blocks.shape[1], blocks)
        return rows.nbytes

    with output:
        try:
            for n_bytes in ordered_map(write, _chunks(file), threads):
                progress.advance(n_bytes)
        finally:
            progress.finish()
        return output.commit()


def _chunks(file: GGUFFile) -> Iterator[Chunk]:
    for index, tensor in enumerate(file.tensors):
        yield from row_chunks(index, tensor.n_rows, tensor.row_length)


def _scales(file: GGUFFile, plan: Plan) -> list[Scale]:
    """Return how every tensor's errors are weighed, as when the plan was made."""
    imatrix = planned_imatrix(plan.imatrix)
    return [
        Scale.of(t, imatrix if a.format != a.source_format else None)
        for t, a in zip(file.tensors, plan.assignments, strict=True)
    ]


def _encoded(
    rows: NDArray[np.uint8], start: int, tensor: TensorInfo, scale: Scale, to: str, encoder: str
) -> NDArray[np.uint8]:
    if to == tensor.type_name:
        return rows
    try:
        return scale.encode(to, tensor.type_name, rows, start, tensor.row_length, encoder)
    except ValueError as e:
        raise FormatError(f"{tensor.name}: {e}") from None


def verify(
    file: GGUFFile, plan: Plan, paths: Sequence[Path], *, threads: int, progress: Progress
) -> float:
    """Open the output, decode every tensor and return the largest relative departure of its NMSE.

    Raises GGUFError naming the tensor when a format, a copied byte or an error differs from the
    plan's, or when the file's size is not the planned one.
    """
    worst = 0.0
    with open_gguf(paths[0]) as written:
        if written.n_bytes != plan.n_bytes:
            raise GGUFError(
                f"{paths[0]} has {written.n_bytes} bytes, the plan {plan.n_bytes}; please report it"
            )
        progress.start("verify", sum(t.n_bytes for t in file.tensors), "bytes")
        squared = [0.0] * len(file.tensors)
        scales = _scales(file, plan)
        total = [0.0] * len(file.tensors)

        def compare(chunk: Chunk) -> tuple[int, int, float, float]:
            planned = plan.assignments[chunk.index]
            return _compare(file, written, planned, scales[chunk.index], chunk)

        try:
            for index, n_bytes, error, norm in ordered_map(compare, _chunks(file), threads):
                squared[index] += error
                total[index] += norm
                progress.advance(n_bytes)
        finally:
            progress.finish()
    for i, (a, error, norm) in enumerate(zip(plan.assignments, squared, total, strict=True)):
        nmse = error / norm if norm else 0.0
        if not formats.get(a.format).encodable and a.format != a.source_format:
            nmse = _sampled_nmse(file, a, scales[i], paths[0], nmse)
        departure = abs(nmse - a.nmse) / a.nmse if a.nmse else nmse
        if departure > NMSE_TOLERANCE:
            raise GGUFError(f"{a.name}: NMSE {nmse:.6e} was written, {a.nmse:.6e} was planned")
        worst = max(worst, departure)
    return worst


def _sampled_nmse(
    file: GGUFFile, planned: Assignment, scale: Scale, path: Path, whole_nmse: float
) -> float:
    """Return the NMSE of the rows that were measured; that of all rows must be of its kind."""
    with open_gguf(path) as written:
        found = written_sample(file, file.tensor(planned.name), scale, written)
    if not whole_nmse <= 2 * found.nmse + 10 * found.standard_error:
        raise GGUFError(
            f"{planned.name}: NMSE {whole_nmse:.3e} was written, {found.nmse:.3e} ± "
            f"{found.standard_error:.1e} was expected from a sample; please report it"
        )
    return found.nmse


def _compare(
    file: GGUFFile, written: GGUFFile, planned: Assignment, scale: Scale, chunk: Chunk
) -> tuple[int, int, float, float]:
    """Return the tensor's index, the source bytes compared, Σ(x−q)² and Σx² of one chunk.

    The sums are weighed by scale.
    """
    source, target = file.tensors[chunk.index], written.tensor(planned.name)
    if target.type_name != planned.format or target.shape != source.shape:
        raise GGUFError(
            f"{planned.name} was written as {target.type_name} {target.shape}, "
            f"planned as {planned.format} {source.shape}"
        )
    before = file.read_rows(source, chunk.start, chunk.stop)
    after = written.read_rows(target, chunk.start, chunk.stop)
    if source.type_name == target.type_name:
        if not np.array_equal(before, after):
            raise GGUFError(f"{planned.name} was to be copied, and its bytes differ")
        return chunk.index, before.nbytes, 0.0, 1.0
    stats = scale.compare(source.type_name, before, target.type_name, after, chunk.start)
    return chunk.index, before.nbytes, scale.error(stats.errors[0]), scale.squares(stats)
