"""From a model file to a Measurement: every tensor's rate–distortion curve, in one pass."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

from ramgguf import _core
from ramgguf.core.errors import FormatError, PlanError
from ramgguf.core.gc_paused import gc_paused
from ramgguf.core.parallel import Buffers, Run, default_threads, map_runs, runs, sample
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.gguf.architecture import layer_of, role_of
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.identity import Source
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.gguf.weight_scale import mean_squared_scale
from ramgguf.measure.candidates import (
    TERNARY_NMSE,
    Job,
    is_source,
    jobs_of,
    restricted,
    tried,
)
from ramgguf.measure.result import Measurement, Point, TensorMeasurement
from ramgguf.quants import codec, formats, grids
from ramgguf.quants.codec import Piece, Rows
from ramgguf.quants.coverage import coverage_notes
from ramgguf.quants.encoders import DEFAULT_ENCODER, EncoderName
from ramgguf.quants.formats import expand
from ramgguf.quants.formats import get as get_format
from ramgguf.quants.imatrix import Imatrix, load_importance
from ramgguf.quants.output_metadata import overhead_bytes
from ramgguf.quants.row_samples import SampledError, measure_samples

PROJECTOR_NOTE = (
    "a multimodal projector: priors guess what matters, and no KLD is measured; compare what the "
    "language model says of images or sound"
)


@dataclass(frozen=True)
class _Measured:
    """What was measured on a run of chunks: which tensors' they are, and what each holds.

    There are no statistics of types that cannot be decoded. exact are those of the blocks that hold
    weights on a grid.
    """

    found: list[tuple[int, _core.RowStats]]
    exact: list[tuple[int, _core.RowStats]]
    n_bytes: int
    digest: bytes


def measure_file(
    file: GGUFFile,
    *,
    n_overhead_bytes: int,
    wanted: Sequence[str] | None = None,
    encoder: EncoderName = "rtn",
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    sampled: bool = False,
    slow: bool = True,
    only: Mapping[str, frozenset[str]] | None = None,
    others: bool = True,
    threads: int,
    progress: Progress,
) -> Measurement:
    """Return bytes and error of every tensor in every format that its shape allows.

    wanted names the formats to try (default: those that candidates.tried offers). With `sampled`,
    statistics are those of some rows of each tensor; without `slow`, formats that libggml encodes
    slowly are named but not measured. A tensor that `only` names is measured in those formats, no
    others; without `others`, tensors that it does not name are left out, and the source has no hash
    of its data. n_overhead_bytes is what the output's header will take. Errors are weighed by the
    importance that imatrix has.

    Raises FormatError for NaN or infinity in the weights, naming tensor and index, and for a format
    that needs what is not there, ImatrixError for an entry of another shape or a matrix of another
    model, and PlanError when nothing in the model can be quantized.
    """
    start = time.perf_counter()
    names = tried(wanted, imatrix)
    coverage = coverage_notes(file, imatrix)
    jobs = jobs_of(file, names, imatrix, allow_requantize, tell_ternary=bool(wanted))
    if only is not None:
        named = jobs if others else [job for job in jobs if job.tensor.name in only]
        jobs = [restricted(job, only.get(job.tensor.name)) for job in named]
    if all(job.kept for job in jobs):
        raise PlanError(
            f"{file.paths[0]}: nothing to quantize ({jobs[0].kept or 'no tensors'}); "
            "a source in F32, F16 or BF16 is needed, or a quantized one with --allow-requantize"
        )
    parts: list[list[_core.RowStats]] = [[] for _ in jobs]
    exact: list[list[_core.RowStats]] = [[] for _ in jobs]
    data, buffers = hashlib.sha256(), Buffers()
    work = list((sample if sampled else runs)([job.tensor for job in jobs]))
    total = sum((c.stop - c.start) * jobs[c.index].tensor.row_bytes for run in work for c in run)
    progress.start("sample" if sampled else "measure", total, "bytes")
    try:
        for measured in map_runs(
            lambda run: _measure(file, jobs, run, encoder, buffers), work, threads
        ):
            data.update(measured.digest)
            for index, stats in measured.found:
                parts[index].append(stats)
            for index, stats in measured.exact:
                exact[index].append(stats)
            progress.advance(measured.n_bytes)
    finally:
        progress.finish()
    skipped = () if slow else formats.with_importance()
    by_libggml = [
        (job.tensor, job.scale, [name for name in job.sampled if name not in skipped])
        for job in jobs
    ]
    of_samples = measure_samples(file, by_libggml, threads=threads, progress=progress)
    return Measurement(
        ramgguf_version=__version__,
        source=Source.of(file, data.hexdigest() if others and not sampled else None),
        encoder=encoder,
        imatrix=imatrix.source if imatrix else None,
        formats=(*names, *sorted(_others(jobs) - set(names))),
        n_overhead_bytes=n_overhead_bytes,
        alignment=file.alignment,
        n_layers=file.n_trunk_layers,
        tensors=_tensors(file, jobs, parts, exact, of_samples),
        seconds=time.perf_counter() - start,
        notes=(
            *coverage,
            *((PROJECTOR_NOTE,) if file.is_projector else ()),
            *_on_grids(jobs),
            *_unsuited(jobs, wanted),
            *_idle_requantize(jobs, allow_requantize),
        ),
    )


def _others(jobs: Sequence[Job]) -> set[str]:
    """Return formats that suit some tensors, asked for or not: grids, 16 bits for odd rows."""
    return {name for j in jobs for name in (*j.candidates, *j.sampled, j.grid) if name}


def _on_grids(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield how many tensors lie on the grid of a format, by format."""
    found = Counter(job.grid for job in jobs if job.grid is not None)
    for name, n in found.most_common():
        yield (
            f"on the grid of {name} ({formats.get(name).bpw:g} bpw), which holds them exactly: "
            f"{format_count(n, 'tensor')}, with no larger format"
        )


def _unsuited(jobs: Sequence[Job], wanted: Sequence[str] | None) -> Iterator[str]:
    """Yield which of the formats asked for suit no tensor, and why."""
    for name in wanted or ():
        reasons = {job.excluded.get(name) for job in jobs if job.kept is None}
        used = any(name in (*j.candidates, *j.sampled, j.tensor.type_name) for j in jobs)
        if not used:
            known = sorted(reason for reason in reasons if reason)
            yield f"{name} suits no tensor{': ' if known else ''}{'; '.join(known[:2])}"


def _idle_requantize(jobs: Sequence[Job], allow_requantize: bool) -> Iterator[str]:
    quantized = [j for j in jobs if j.tensor.type_name not in formats.FLOAT_FORMATS]
    if allow_requantize and not any(j.candidates or j.sampled for j in quantized):
        yield "--allow-requantize changed nothing: no tensor of the source is quantized"


def _measure(
    file: GGUFFile, jobs: Sequence[Job], run: Run, encoder: str, buffers: Buffers
) -> _Measured:
    ranges = [(jobs[c.index].tensor, c.start, c.stop) for c in run]
    rows, read = file.read_ranges(ranges, partial(buffers.take, "rows"))
    digest = hashlib.sha256()
    for data in read:
        digest.update(data.data)
    known = [
        (jobs[c.index], c, data)
        for c, data in zip(run, rows, strict=True)
        if is_source(jobs[c.index].tensor.type_name)
    ]
    stats = codec.measure(
        [Piece(job.scale, job.tensor.type_name, data, c.start) for job, c, data in known],
        [job.candidates for job, _, _ in known],
        encoder,
    )
    for (job, c, _), found in zip(known, stats, strict=True):
        if found.first_nonfinite >= 0:
            index = c.start * job.tensor.row_length + found.first_nonfinite
            raise FormatError(
                f"{file.paths[job.tensor.shard]}: {job.tensor.name}[{index}] is NaN or infinite; "
                "the model is damaged or was converted wrongly"
            )
    return _Measured(
        [(c.index, found) for (_, c, _), found in zip(known, stats, strict=True)],
        [(c.index, _exact(job, c.start, data)) for job, c, data in known if job.grid],
        sum(data.nbytes for data in rows),
        digest.digest(),
    )


def _exact(job: Job, start: int, rows: Rows) -> _core.RowStats:
    """Return what the exact blocks of rows on a grid differ by: the rounding of the source."""
    assert job.grid is not None
    blocks = grids.encode(job.grid, job.tensor.type_name, rows)
    return job.scale.compare(job.tensor.type_name, rows, job.grid, blocks, start)


def _tensors(
    file: GGUFFile,
    jobs: Sequence[Job],
    parts: Sequence[list[_core.RowStats]],
    exact: Sequence[list[_core.RowStats]],
    of_samples: Sequence[Mapping[str, SampledError | str]],
) -> tuple[TensorMeasurement, ...]:
    with gc_paused():
        return tuple(
            _tensor(file, *known) for known in zip(jobs, parts, exact, of_samples, strict=True)
        )


def _tensor(
    file: GGUFFile,
    job: Job,
    parts: list[_core.RowStats],
    exact: list[_core.RowStats],
    of_samples: Mapping[str, SampledError | str],
) -> TensorMeasurement:
    tensor = job.tensor
    total = _core.RowStats.merged(parts) if len(parts) > 1 else next(iter(parts), None)
    points, excluded = _points(job, total, of_samples)
    if job.grid is not None:
        points = tuple(
            sorted((*points, _grid_point(job, exact)), key=attrgetter("n_bytes", "nmse"))
        )
    weighed = total is not None and job.scale.importance is not None
    larger = mean_squared_scale(file, tensor) if total else 1.0
    return TensorMeasurement(
        name=tensor.name,
        shape=tensor.shape,
        role=role_of(tensor.name, file.architecture, tied=file.has_tied_embedding),
        layer=layer_of(tensor.name),
        source_format=tensor.type_name,
        n_bytes=tensor.n_bytes,
        sum_squares=larger * total.sum_squares if total else 0.0,
        output_squares=larger * job.scale.squares(total) if total and weighed else None,
        max_abs=total.max_abs if total else 0.0,
        excess_kurtosis=_excess_kurtosis(total) if total else 0.0,
        points=points,
        excluded=excluded,
        kept=job.kept,
        grid=job.grid,
    )


def _grid_point(job: Job, parts: Sequence[_core.RowStats]) -> Point:
    """Return the point of the format on whose grid the tensor lies."""
    assert job.grid is not None
    scale, tensor = job.scale, job.tensor
    squares = sum(scale.squares(part) for part in parts) or math.inf
    plain = sum(part.sum_squares for part in parts) or math.inf
    return Point(
        job.grid,
        formats.row_bytes(job.grid, tensor.row_length) * tensor.n_rows,
        sum(scale.error(part.errors[0]) for part in parts) / squares,
        max(part.errors[0].max_error for part in parts),
        0.0,
        None
        if scale.importance is None
        else sum(part.errors[0].sum_squared_error for part in parts) / plain,
    )


def _points(
    job: Job, total: _core.RowStats | None, of_samples: Mapping[str, SampledError | str]
) -> tuple[tuple[Point, ...], dict[str, str]]:
    """Return the tensor's points by ascending bytes, and why other formats are none."""
    tensor, excluded = job.tensor, dict(job.excluded)
    n_rows, row_length = tensor.n_rows, tensor.row_length
    found = [Point(tensor.type_name, tensor.n_bytes, 0.0, 0.0)]
    if total is not None:
        squares = job.scale.squares(total) or math.inf
        # Where the NMSE is weighted, the unweighted NMSE is kept as well.
        plain = None if job.scale.importance is None else total.sum_squares or math.inf
        for name, squared, weighted, max_error, overflow in total.error_rows():
            nmse = (squared if plain is None else weighted) / squares
            if overflow:
                excluded[name] = "a block's scale would overflow F16"
            elif name not in formats.TERNARY or nmse <= TERNARY_NMSE:
                n_bytes = formats.row_bytes(name, row_length) * n_rows
                found.append(Point(name, n_bytes, nmse, max_error, 0.0, plain and squared / plain))
    for name, sampled in of_samples.items():
        if isinstance(sampled, str):
            excluded[name] = sampled
            continue
        found.append(
            Point(
                name,
                formats.row_bytes(name, row_length) * n_rows,
                sampled.nmse,
                sampled.max_error,
                sampled.standard_error,
                None if job.scale.importance is None else sampled.plain_nmse,
            )
        )
    found.sort(key=attrgetter("n_bytes", "nmse"))
    return tuple(found), excluded


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


def measure(
    model: str | Path,
    *,
    formats: Sequence[str] | None = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Return the rate–distortion curves of all tensors of a GGUF model.

    model is a path or hf://ORG/REPO/FILE.gguf, on the hub. formats are the names to try, by
    default all that need no calibration data. imatrix is a file of llama-imatrix, GGUF or .dat:
    errors are then weighted by column importance; with a file of Hessians they are those of the
    outputs, and the encoder can be gptq.

    Raises GGUFError for a file that is malformed or no language model, FormatError for weights that
    are not finite or a format that does not exist, ImatrixError for an unfit imatrix.
    """
    wanted = None if formats is None else expand(formats)
    for name in wanted or ():
        get_format(name)
    weighed = load_importance(imatrix, hessian, encoder)
    with open_gguf(local_path(model), kind_check=True, or_projector=True) as file:
        return measure_file(
            file,
            n_overhead_bytes=overhead_bytes(file, weighed.source if weighed else None),
            wanted=wanted,
            encoder=encoder,
            imatrix=weighed,
            allow_requantize=allow_requantize,
            threads=threads or default_threads(),
            progress=progress or Silent(),
        )
