"""From a model file to a Measurement: every tensor's rate–distortion curve, in one pass."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ramgguf import _core, formats
from ramgguf.candidates import TERNARY_NMSE, suited, tried
from ramgguf.errors import FormatError, PlanError
from ramgguf.gguf_io import GGUFFile, TensorInfo
from ramgguf.hub import origin_of
from ramgguf.imatrix import Imatrix
from ramgguf.parallel import Buffers, Chunk, batches, map_chunks, sample
from ramgguf.progress import Progress
from ramgguf.roles import layer_of, never_quantized, role_of
from ramgguf.sampling import SampledError, measure_samples
from ramgguf.schema import Encoder, Measurement, Point, Source, TensorMeasurement
from ramgguf.version import __version__
from ramgguf.weighing import Scale

# What weights may be stored in to be quantized; Q8_0 only when asked for.
FLOAT_FORMATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Job:
    """A tensor with its candidates and importance; `kept` says why it has no candidates.

    sampled are candidates that are measured on a sample of the rows only.
    """

    tensor: TensorInfo
    scale: Scale
    candidates: tuple[str, ...]
    sampled: tuple[str, ...]
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
    sampled: bool = False,
    only: Mapping[str, frozenset[str]] | None = None,
    threads: int,
    progress: Progress,
) -> Measurement:
    """Return bytes and error of every tensor in every format that its shape allows.

    wanted names the formats to try (default: those that candidates.tried offers). With `sampled`,
    statistics are those of some rows of each tensor; with `only`, a tensor named there is measured
    in those formats, no others. n_overhead_bytes is what the output's header will take. Errors are
    weighed by the importance that imatrix has. Raises FormatError for NaN or infinity in the
    weights, naming tensor and index, and for a format that needs what is not there, ImatrixError
    for an entry of another shape, and PlanError when nothing in the model can be quantized.
    """
    start = time.perf_counter()
    names = tried(wanted, imatrix)
    jobs = _jobs(file, names, imatrix, allow_requantize, tell_ternary=bool(wanted))
    if only is not None:
        jobs = [_restricted(job, only.get(job.tensor.name)) for job in jobs]
    if all(job.kept for job in jobs):
        raise PlanError(
            f"{file.paths[0]}: nothing to quantize ({jobs[0].kept or 'no tensors'}); "
            "a source in F32, F16 or BF16 is needed, or Q8_0 with --allow-requantize"
        )
    parts: list[list[_core.RowStats]] = [[] for _ in jobs]
    data, buffers = hashlib.sha256(), Buffers()
    work = list((sample if sampled else batches)(file.tensors))
    total = sum((c.stop - c.start) * jobs[c.index].tensor.row_bytes for b in work for c in b)
    progress.start("sample" if sampled else "measure", total, "bytes")
    try:
        for part in map_chunks(
            lambda c: _measure(file, jobs[c.index], c, encoder, buffers), work, threads
        ):
            data.update(part.digest)
            if part.stats is not None:
                parts[part.index].append(part.stats)
            progress.advance(part.n_bytes)
    finally:
        progress.finish()
    slow = [(job.tensor, job.scale, job.sampled) for job in jobs]
    of_samples = measure_samples(file, slow, threads=threads, progress=progress)
    tied = not any(role_of(t.name, file.architecture) == "head" for t in file.tensors)
    return Measurement(
        ramgguf_version=__version__,
        source=_source(file, None if sampled else data.hexdigest()),
        encoder=encoder,
        imatrix=imatrix.source if imatrix else None,
        formats=names,
        n_overhead_bytes=n_overhead_bytes,
        alignment=file.alignment,
        n_layers=file.n_layers,
        tensors=tuple(
            _tensor(file, *known, tied) for known in zip(jobs, parts, of_samples, strict=True)
        ),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Candidates:
    """The smaller formats that rows of a kind suit, and why others do not."""

    names: tuple[str, ...]
    excluded: dict[str, str]


def _candidates(
    type_name: str, row_length: int, row_bytes: int, wanted: Sequence[str]
) -> _Candidates:
    names, excluded = [], {}
    for name in wanted:
        if name == type_name:
            continue
        if not formats.suits(name, row_length):
            block = formats.get(name).block_size
            excluded[name] = f"rows of {row_length} are no multiple of {block}"
        elif formats.row_bytes(name, row_length) < row_bytes:
            names.append(name)
    return _Candidates(tuple(names), excluded)


def _jobs(
    file: GGUFFile,
    wanted: Sequence[str],
    imatrix: Imatrix | None,
    allow_requantize: bool,
    *,
    tell_ternary: bool,
) -> list[_Job]:
    found: dict[tuple[str, int], _Candidates] = {}  # a model has few kinds of rows
    jobs = []
    for tensor in file.tensors:
        kept = _reason_to_keep(file, tensor, allow_requantize)
        if kept is not None:
            jobs.append(_Job(tensor, Scale.of(tensor, None), (), (), {}, kept))
            continue
        kind = (tensor.type_name, tensor.row_length)
        if kind not in found:
            found[kind] = _candidates(*kind, tensor.row_bytes, wanted)
        names, excluded = found[kind].names, found[kind].excluded
        kept = None if names else "no smaller format suits its rows"
        scale = Scale.of(tensor, imatrix if names else None)
        split = suited(file, tensor, scale, names, tell_ternary=tell_ternary)
        excluded = excluded | split.excluded
        jobs.append(_Job(tensor, scale, split.measured, split.sampled, excluded, kept))
    return jobs


def _restricted(job: _Job, only: frozenset[str] | None) -> _Job:
    if only is None:
        return job
    return replace(
        job,
        candidates=tuple(name for name in job.candidates if name in only),
        sampled=tuple(name for name in job.sampled if name in only),
    )


def _reason_to_keep(file: GGUFFile, tensor: TensorInfo, allow_requantize: bool) -> str | None:
    if tensor.type_name == "Q8_0" and not allow_requantize:
        return "already quantized to Q8_0 (--allow-requantize takes it as a source)"
    if tensor.type_name not in (*FLOAT_FORMATS, "Q8_0"):
        return f"copied: {tensor.type_name} is no source for quantization"
    return never_quantized(tensor.name, tensor.shape, file.architecture)


def _measure(file: GGUFFile, job: _Job, chunk: Chunk, encoder: str, buffers: Buffers) -> _Part:
    n_bytes = (chunk.stop - chunk.start) * job.tensor.row_bytes
    rows = file.read_rows(job.tensor, chunk.start, chunk.stop, buffers.take("rows", n_bytes))
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


def _points(
    job: _Job, total: _core.RowStats | None, of_samples: Mapping[str, SampledError | str]
) -> tuple[tuple[Point, ...], dict[str, str]]:
    """Return the tensor's points by ascending bytes, and why other formats are none."""
    tensor, excluded = job.tensor, dict(job.excluded)
    n_rows, row_length = tensor.n_rows, tensor.row_length
    squares = job.scale.squares(total) if total else 0.0
    points = [Point(format=tensor.type_name, n_bytes=tensor.n_bytes, nmse=0.0, max_error=0.0)]
    for error in total.errors if total else ():
        name = error.format
        nmse = job.scale.error(error) / squares if squares else 0.0
        if error.scale_overflow:
            excluded[name] = "a block's scale would overflow F16"
        elif name not in formats.TERNARY or nmse <= TERNARY_NMSE:
            points.append(
                Point(
                    format=name,
                    n_bytes=formats.row_bytes(name, row_length) * n_rows,
                    nmse=nmse,
                    max_error=error.max_error,
                    plain_nmse=_plain_nmse(job, error.sum_squared_error, total),
                )
            )
    for name, found in of_samples.items():
        if isinstance(found, str):
            excluded[name] = found
            continue
        point = Point(
            format=name,
            n_bytes=formats.row_bytes(name, row_length) * n_rows,
            nmse=found.nmse,
            max_error=found.max_error,
            nmse_error=found.standard_error,
            plain_nmse=found.plain_nmse,
        )
        points.append(point)
    return tuple(sorted(points, key=lambda p: (p.n_bytes, p.nmse))), excluded


def _plain_nmse(job: _Job, error: float, total: _core.RowStats | None) -> float | None:
    """Return Σ(x−q)² / Σx² where the tensor's NMSE is another; None where it is this."""
    if job.scale.importance is None or total is None:
        return None
    return error / total.sum_squares if total.sum_squares else 0.0


def _tensor(
    file: GGUFFile,
    job: _Job,
    parts: list[_core.RowStats],
    of_samples: Mapping[str, SampledError | str],
    tied: bool,
) -> TensorMeasurement:
    tensor = job.tensor
    total = _core.RowStats.merged(parts) if parts else None
    points, excluded = _points(job, total, of_samples)
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
        points=points,
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


def _source(file: GGUFFile, data_sha256: str | None) -> Source:
    return Source(
        path=str(file.paths[0]),
        n_bytes=file.n_bytes,
        header_sha256=file.header_sha256,
        data_sha256=data_sha256,
        architecture=file.architecture,
        name=file.name,
        hub=origin_of(file.paths[0]),
    )
