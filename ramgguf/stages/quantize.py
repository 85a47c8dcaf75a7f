"""From a Plan to a file: writing what was planned."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ramgguf import formats, weighing
from ramgguf.errors import FormatError, PlanError
from ramgguf.gguf_io import GGUFFile
from ramgguf.gguf_layout import Layout, plan_layout
from ramgguf.gguf_values import Value, string, u32, u64
from ramgguf.gguf_write import GGUFOutput
from ramgguf.hub import HubFile
from ramgguf.imatrix import imatrix_keys
from ramgguf.parallel import Buffers, Run, map_runs, runs
from ramgguf.progress import Progress
from ramgguf.schema import ImportanceSource, Plan
from ramgguf.version import __version__
from ramgguf.weighing import Piece, Rows, planned_scales


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
    scales = planned_scales(file, plan)
    buffers = Buffers()

    def encode(run: Run) -> int:
        ranges = [(file.tensors[c.index], c.start, c.stop) for c in run]
        rows, _ = file.read_ranges(ranges, partial(buffers.take, "source"))
        planned = [plan.assignments[c.index] for c in run]
        widths = [
            0 if a.format == a.source_format else formats.row_bytes(a.format, t.row_length)
            for a, (t, _, _) in zip(planned, ranges, strict=True)
        ]
        blocks = _blocks(widths, rows, buffers)
        changed = [i for i, data in enumerate(blocks) if data is not rows[i]]
        pieces = [
            Piece(scales[run[i].index], planned[i].source_format, rows[i], run[i].start)
            for i in changed
        ]
        to, into = [planned[i].format for i in changed], [blocks[i] for i in changed]
        try:
            weighing.encode(pieces, to, into, plan.encoder)
        except ValueError:
            _name_misfit([planned[i].name for i in changed], pieces, to, into, plan.encoder)
            raise
        output.write_pieces(
            (a.name, c.start * data.shape[1], data)
            for a, c, data in zip(planned, run, blocks, strict=True)
        )
        return sum(data.nbytes for data in rows)

    progress.start("quantize", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        for n_bytes in map_runs(encode, runs(file.tensors), threads):
            progress.advance(n_bytes)
    finally:
        progress.finish()


def _blocks(widths: Sequence[int], rows: Sequence[Rows], buffers: Buffers) -> list[Rows]:
    """Return memory for as many rows of so many bytes each; the rows themselves where that is 0."""
    sizes = [len(data) * width for data, width in zip(rows, widths, strict=True)]
    left = buffers.take("blocks", sum(sizes))
    blocks = []
    for data, size, width in zip(rows, sizes, widths, strict=True):
        blocks.append(left[:size].reshape(-1, width) if width else data)
        left = left[size:]
    return blocks


def _name_misfit(
    names: Sequence[str],
    pieces: Sequence[Piece],
    to: Sequence[str],
    into: Sequence[Rows],
    encoder: str,
) -> None:
    """Raise FormatError for the first piece that cannot be encoded, by the tensor's name."""
    for name, piece, form, out in zip(names, pieces, to, into, strict=True):
        try:
            weighing.encode([piece], [form], [out], encoder)
        except ValueError as e:
            raise FormatError(f"{name}: {e}") from None
