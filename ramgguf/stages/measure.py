"""From a model file to a Measurement: every tensor's rate–distortion curve, in one pass."""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ramgguf import _core, formats
from ramgguf.errors import FormatError, PlanError
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.imatrix import Imatrix
from ramgguf.parallel import Chunk, ordered_map, row_chunks
from ramgguf.progress import Progress
from ramgguf.roles import layer_of, never_quantized, role_of
from ramgguf.schema import Encoder, Measurement, Point, Source, TensorMeasurement
from ramgguf.version import __version__
from ramgguf.weighing import Scale

# What weights may be stored in to be quantized; Q8_0 only when asked for.
FLOAT_FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Job:
    """A tensor with its candidates and importance; `kept` says why it has no candidates."""

    tensor: TensorInfo
    scale: Scale
    candidates: tuple[str, ...]
    excluded: dict[str, str]
    kept: str | None


@dataclass(frozen=True)
class _Part:
    """What was measured on one chunk; stats is None for a tensor that is not quantized."""

    index: int
    n_bytes: int
    digest: bytes
    stats: _core.RowStats | None


def measure(
    file: GGUFFile,
    *,
    n_overhead_bytes: int,
    wanted: Sequence[str] | None = None,
    encoder: Encoder = "rtn",
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    threads: int,
    progress: Progress,
) -> Measurement:
    """Return bytes and error of every tensor in every format that its shape allows.

    wanted names the formats to try (default: every RTN format). n_overhead_bytes is what the
    output's header will take. Errors are weighed by the importance that imatrix has. Raises
    FormatError for NaN or infinity in the weights, naming tensor and index, ImatrixError for an
    entry of another shape, and PlanError when nothing in the model can be quantized.
    """
    start = time.perf_counter()
    names = tuple(wanted or formats.quantized())
    jobs = [_job(file, t, names, imatrix, allow_requantize) for t in file.tensors]
    if all(job.kept for job in jobs):
        raise PlanError(
            f"{file.paths[0]}: nothing to quantize ({jobs[0].kept or 'no tensors'}); "
            "a source in F32, F16 or BF16 is needed, or Q8_0 with --allow-requantize"
        )
    parts: list[list[_core.RowStats]] = [[] for _ in jobs]
    data = hashlib.sha256()
    progress.start("measure", sum(job.tensor.n_bytes for job in jobs), "bytes")
    try:
        for part in ordered_map(lambda c: _measure(file, jobs, c, encoder), _chunks(jobs), threads):
            data.update(part.digest)
            if part.stats is not None:
                parts[part.index].append(part.stats)
            progress.advance(part.n_bytes)
    finally:
        progress.finish()
    tied = not any(role_of(t.name, file.architecture) == "head" for t in file.tensors)
    return Measurement(
        ramgguf_version=__version__,
        source=_source(file, data.hexdigest()),
        encoder=encoder,
        imatrix=imatrix.source if imatrix else None,
        formats=names,
        n_overhead_bytes=n_overhead_bytes,
        alignment=file.alignment,
        n_layers=file.n_layers,
        tensors=tuple(
            _tensor(file, job, stats, tied) for job, stats in zip(jobs, parts, strict=True)
        ),
        seconds=time.perf_counter() - start,
    )


def _job(
    file: GGUFFile,
    tensor: TensorInfo,
    wanted: Sequence[str],
    imatrix: Imatrix | None,
    allow_requantize: bool,
) -> _Job:
    kept = _reason_to_keep(file, tensor, allow_requantize)
    if kept is not None:
        return _Job(tensor, Scale.of(tensor, None), (), {}, kept)
    scale = Scale.of(tensor, imatrix)
    candidates, excluded = [], {}
    for name in wanted:
        if name == tensor.type_name:
            continue
        if not formats.suits(name, tensor.row_length):
            block = formats.get(name).block_size
            excluded[name] = f"rows of {tensor.row_length} are no multiple of {block}"
        elif formats.row_bytes(name, tensor.row_length) < tensor.row_bytes:
            candidates.append(name)
    if not candidates:
        return _Job(tensor, scale, (), excluded, "no smaller format suits its rows")
    return _Job(tensor, scale, tuple(candidates), excluded, None)


def _reason_to_keep(file: GGUFFile, tensor: TensorInfo, allow_requantize: bool) -> str | None:
    if tensor.type_name == "Q8_0" and not allow_requantize:
        return "already quantized to Q8_0 (--allow-requantize takes it as a source)"
    if tensor.type_name not in (*FLOAT_FORMATS, "Q8_0"):
        return f"copied: {tensor.type_name} is no source for quantization"
    return never_quantized(tensor.name, tensor.shape, file.architecture)


def _chunks(jobs: Sequence[_Job]) -> Iterator[Chunk]:
    for index, job in enumerate(jobs):
        yield from row_chunks(index, job.tensor.n_rows, job.tensor.row_length)


def _measure(file: GGUFFile, jobs: Sequence[_Job], chunk: Chunk, encoder: str) -> _Part:
    job = jobs[chunk.index]
    rows = file.read_rows(job.tensor, chunk.start, chunk.stop)
    stats = None
    if job.tensor.type_name in (*FLOAT_FORMATS, "Q8_0"):
        stats = job.scale.measure(job.candidates, job.tensor.type_name, rows, chunk.start, encoder)
        if stats.first_nonfinite >= 0:
            index = chunk.start * job.tensor.row_length + stats.first_nonfinite
            raise FormatError(
                f"{file.paths[job.tensor.shard]}: {job.tensor.name}[{index}] is NaN or infinite; "
                "the model is damaged or was converted wrongly"
            )
    return _Part(chunk.index, rows.nbytes, hashlib.sha256(rows.data).digest(), stats)


def _tensor(
    file: GGUFFile, job: _Job, parts: list[_core.RowStats], tied: bool
) -> TensorMeasurement:
    tensor, excluded = job.tensor, dict(job.excluded)
    total = _core.RowStats.merged(parts) if parts else None
    points = [Point(format=tensor.type_name, n_bytes=tensor.n_bytes, nmse=0.0, max_error=0.0)]
    for error in total.errors if total else ():
        if error.scale_overflow:
            excluded[error.format] = "a block's scale would overflow F16"
            continue
        n_bytes = formats.row_bytes(error.format, tensor.row_length) * tensor.n_rows
        squares = job.scale.squares(total) if total else 0.0
        nmse = job.scale.error(error) / squares if squares else 0.0
        points.append(
            Point(format=error.format, n_bytes=n_bytes, nmse=nmse, max_error=error.max_error)
        )
    role = role_of(tensor.name, file.architecture)
    return TensorMeasurement(
        name=tensor.name,
        shape=tensor.shape,
        role="tied_embedding" if role == "embedding" and tied else role,
        layer=layer_of(tensor.name),
        source_format=tensor.type_name,
        n_bytes=tensor.n_bytes,
        sum_squares=total.sum_squares if total else 0.0,
        output_squares=job.scale.squares(total)
        if total and job.scale.importance is not None
        else None,
        max_abs=total.max_abs if total else 0.0,
        excess_kurtosis=_excess_kurtosis(total) if total else 0.0,
        points=tuple(sorted(points, key=lambda p: (p.n_bytes, p.nmse))),
        excluded=excluded,
        kept=job.kept,
    )


def _excess_kurtosis(stats: _core.RowStats) -> float:
    """Return the fourth central moment over the squared variance, less 3; 0 for constants."""
    n = stats.n_weights
    mean, square = stats.sum / n, stats.sum_squares / n
    variance = square - mean**2
    if variance <= 1e-12 * square or square == 0:
        return 0.0
    cube, fourth = stats.sum_cubes / n, stats.sum_fourths / n
    central = fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
    return central / variance**2 - 3


def _source(file: GGUFFile, data_sha256: str) -> Source:
    return Source(
        path=str(file.paths[0]),
        n_bytes=file.n_bytes,
        header_sha256=file.header_sha256,
        data_sha256=data_sha256,
        architecture=file.architecture,
        name=file.name,
    )
