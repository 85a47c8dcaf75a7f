"""From a Plan to a file: writing what was planned, and measuring what was written."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path

from ramgguf.core.errors import FormatError, PlanError
from ramgguf.core.parallel import Buffers, Run, map_runs, runs
from ramgguf.core.progress import Progress
from ramgguf.core.units import format_count
from ramgguf.core.version import __version__
from ramgguf.gguf.header import Value
from ramgguf.gguf.identity import require_model, unsure
from ramgguf.gguf.layout import Layout, plan_layout
from ramgguf.gguf.reader import GGUFFile
from ramgguf.gguf.writer import GGUFOutput
from ramgguf.plan.result import Assignment, Plan
from ramgguf.quantize.kept_blocks import KeptBlocks
from ramgguf.quants import codec, formats, grids
from ramgguf.quants.codec import Piece, Rows, is_sampled, tensor_weights
from ramgguf.quants.encoders import encoder
from ramgguf.quants.output_metadata import output_metadata


@dataclass(frozen=True)
class Destination:
    """Where the output goes; split_max_bytes None writes one file."""

    path: Path
    force: bool = False
    split_max_bytes: int | None = None


def planned_metadata(plan: Plan) -> dict[str, Value]:
    """Return the metadata that the planned output has and its source has not."""
    by_format: dict[str, int] = {}
    for a in plan.assignments:
        by_format[a.format] = by_format.get(a.format, 0) + a.n_bytes
    return output_metadata(
        imatrix=plan.imatrix if plan.imatrix_used else None,
        hub=plan.source.hub,
        most_format=max(by_format, key=lambda name: by_format[name]),
        budget=plan.budget,
        plan_sha256=plan.sha256(),
        data_sha256=plan.source.data_sha256,
    )


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
    require_model("the plan", plan.source, file)
    names = [t.name for t in file.tensors]
    if names != [a.name for a in plan.assignments]:
        raise PlanError(f"the plan's tensors are not those of {file.paths[0]}; plan again")


def settled(file: GGUFFile, plan: Plan, destination: Destination) -> Plan:
    """Return the plan as it will be written: with fewer bytes if it uses no importance matrix.

    The plan counted the metadata that name the matrix. They are left out where no tensor is encoded
    by it: none with an entry changes its format, or the encoder does not weigh columns. Raises
    PlanError when the plan is another model's.
    """
    check_source(file, plan)
    notes = [n for n in unsure("the plan", plan.source) if n not in plan.notes]
    if plan.imatrix is not None and plan.imatrix_used and not _uses_imatrix(file, plan):
        notes.append("the importance matrix weighs nothing that is encoded: the output omits it")
        without = plan.model_copy(update={"imatrix_used": False})
        whole, smaller = (planned_layout(file, p, destination).n_bytes for p in (plan, without))
        saved = whole - smaller
        plan = without.model_copy(
            update={
                "n_bytes": plan.n_bytes - saved,
                "n_overhead_bytes": plan.n_overhead_bytes - saved,
            }
        )
    if plan.ramgguf_version != __version__ and destination.split_max_bytes is None:
        plan = _resized(file, plan, destination)
    return plan.model_copy(update={"notes": (*plan.notes, *notes)}) if notes else plan


def _resized(file: GGUFFile, plan: Plan, destination: Destination) -> Plan:
    """Return the plan of another version with the bytes that this one's metadata take."""
    more = planned_layout(file, plan, destination).n_bytes - plan.n_bytes
    if plan.n_bytes + more > max(plan.n_bytes, plan.budget):
        raise PlanError(
            f"the plan is of ramgguf {plan.ramgguf_version}, and with the metadata of {__version__}"
            f" the file has {format_count(more, 'byte')} more than its budget; plan again"
        )
    sizes = {"n_bytes": plan.n_bytes + more, "n_overhead_bytes": plan.n_overhead_bytes + more}
    return plan.model_copy(update=sizes)


def _uses_imatrix(file: GGUFFile, plan: Plan) -> bool:
    weighs = encoder(plan.encoder).weighs_columns
    scales = tensor_weights(file, plan.imatrix, plan.encoded)
    return any(
        scale.importance is not None
        and formats.weighs_columns(a.format)
        and (weighs or not formats.get(a.format).encodable)
        for a, scale in zip(plan.assignments, scales, strict=True)
    )


def begin(file: GGUFFile, plan: Plan, destination: Destination) -> GGUFOutput:
    """Return the planned output, which is to be written, verified and committed.

    It appears under its name only with commit. The plan is settled. Raises GGUFError when the
    output cannot be written.
    """
    layout = planned_layout(file, plan, destination)
    return GGUFOutput(layout, file, force=destination.force)


@dataclass(frozen=True)
class _Encoded:
    """What became of a run: bytes read, and by tensor Σ(x−q)² and Σx², weighted; copies of its
    blocks where they are kept.
    """

    n_bytes: int
    squares: list[tuple[int, float, float]]
    blocks: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class Before:
    """A file that was written by a plan of the same model."""

    plan: Plan
    file: GGUFFile

    def same(self, plan: Plan) -> list[Assignment | None]:
        """Return for each tensor the assignment in this file, where the plan's has its bytes."""
        mine, others = self.plan.imatrix, plan.imatrix
        is_alike = (
            self.plan.encoder == plan.encoder
            and self.plan.quantized_inputs == plan.quantized_inputs
            and (
                mine is others is None
                or (mine is not None and others is not None and mine.encoding == others.encoding)
            )
        )
        pairs = zip(self.plan.assignments, plan.assignments, plan.encoded, strict=True)
        return [
            old
            if is_alike and is_encoded and (old.format, old.is_exact) == (new.format, new.is_exact)
            else None
            for old, new, is_encoded in pairs
        ]


def write(
    file: GGUFFile,
    plan: Plan,
    output: GGUFOutput,
    *,
    measures: bool = False,
    before: Before | None = None,
    kept: KeptBlocks | None = None,
    threads: int,
    progress: Progress,
) -> Plan:
    """Encode every tensor into the output and return the plan.

    If it measures, the plan's errors are those of what was written; a format that is measured on
    a sample of the rows keeps its planned error. Tensors that come out as in the file before are
    copied from it. kept has what a killed run of the same plan has encoded, and gets what this one
    does; it goes without a file before. Raises FormatError for weights that do not fit.
    """
    assert before is None or kept is None
    scales = tensor_weights(file, plan.imatrix, plan.encoded)
    buffers = Buffers()
    same = [None] * len(plan.assignments) if before is None else before.same(plan)
    measured = [
        measures and encoded and old is None and not is_sampled(a.format, scale)
        for a, encoded, old, scale in zip(plan.assignments, plan.encoded, same, scales, strict=True)
    ]
    squared, total = [0.0] * len(measured), [0.0] * len(measured)
    there = {} if before is None else {t.name: t for t in before.file.tensors}

    def copy(run: Run, before: Before) -> None:
        ranges = [(there[file.tensors[c.index].name], c.start, c.stop) for c in run]
        blocks, _ = before.file.read_ranges(ranges, partial(buffers.take, "source"))
        output.write_pieces(
            (plan.assignments[c.index].name, c.start * data.shape[1], data)
            for c, data in zip(run, blocks, strict=True)
        )

    def work(run: Run) -> _Encoded:
        if before is None:
            return encode(run)
        old = [c for c in run if same[c.index] is not None]
        new = [c for c in run if same[c.index] is None]
        copy(old, before)
        found = encode(new) if new else _Encoded(0, [])
        n_copied = sum((c.stop - c.start) * file.tensors[c.index].row_bytes for c in old)
        return replace(found, n_bytes=found.n_bytes + n_copied)

    def encode(run: Run) -> _Encoded:
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
        exact = [planned[i].is_exact for i in changed]
        for piece, name, out, on_grid in zip(pieces, to, into, exact, strict=True):
            if on_grid:
                out[:] = grids.encode(name, piece.type_name, piece.rows)
        searched = [not on_grid for on_grid in exact]
        pieces = list(compress(pieces, searched))
        to, into = list(compress(to, searched)), list(compress(into, searched))
        try:
            codec.encode(pieces, to, into, plan.encoder)
        except ValueError:
            names = compress((planned[i].name for i in changed), searched)
            _name_misfit(list(names), pieces, to, into, plan.encoder)
            raise
        output.write_pieces(
            (a.name, c.start * data.shape[1], data)
            for a, c, data in zip(planned, run, blocks, strict=True)
        )
        squares = []
        for i, a in enumerate(planned):
            index = run[i].index
            if measured[index]:
                scale = scales[index]
                stats = scale.compare(a.source_format, rows[i], a.format, blocks[i], run[i].start)
                squares.append((index, scale.error(stats.errors[0]), scale.squares(stats)))
        is_kept = kept is not None and kept.is_kept
        copies = tuple(data.copy() for data in blocks) if is_kept else ()
        return _Encoded(sum(data.nbytes for data in rows), squares, copies)

    def put(run: Run, blocks: Sequence[memoryview]) -> bool:
        """Write the blocks of a run that was kept; return whether they are as many bytes as due."""
        due = []
        for c, data in zip(run, blocks, strict=True):
            a, t = plan.assignments[c.index], file.tensors[c.index]
            is_changed = a.format != a.source_format
            width = formats.row_bytes(a.format, t.row_length) if is_changed else t.row_bytes
            due.append((a.name, c.start * width, data, (c.stop - c.start) * width))
        if any(len(data) != n for *_, data, n in due):
            return False
        output.write_pieces((name, at, data) for name, at, data, _ in due)
        return True

    def add(squares: Iterable[tuple[int, float, float]], n_bytes: int) -> None:
        for index, error, own in squares:
            squared[index] += error
            total[index] += own
        progress.advance(n_bytes)

    progress.start("quantize", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        left = deque(runs(file.tensors))
        for record, blocks in () if kept is None else kept.begun():
            if not left or len(left[0]) != len(blocks) or not put(left[0], blocks):
                raise PlanError(f"what a killed run has encoded does not suit {file.paths[0]}")
            run = left.popleft()
            rows = sum((c.stop - c.start) * file.tensors[c.index].row_bytes for c in run)
            add(record.squares, rows)
        for encoded in map_runs(work, left, threads):
            add(encoded.squares, encoded.n_bytes)
            if kept is not None:
                kept.add(tuple(encoded.squares), encoded.blocks)
    finally:
        progress.finish()
    if not measures:
        return plan

    def nmse(i: int, planned: Assignment) -> float:
        old = same[i]
        if old is not None:
            return old.nmse
        if not measured[i]:
            return planned.nmse
        return squared[i] / total[i] if total[i] else 0.0

    assignments = tuple(
        a.model_copy(update={"nmse": nmse(i, a)}) for i, a in enumerate(plan.assignments)
    )
    return plan.model_copy(update={"assignments": assignments})


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
            codec.encode([piece], [form], [out], encoder)
        except ValueError as e:
            raise FormatError(f"{name}: {e}") from None
