"""Which scales to take: those with which blocks of weights lose least of the outputs.

A block's weights share a step, which grows with them: the step squared times the number of weights
goes as Σ w_j² s_j², and what the outputs lose as that times Σ d_j / s_j², where d_j is the mean
square of input j, and w_j² that of column j. It is least for s_j = (d_j / w_j²)^(1/4), in each
block up to a factor that changes nothing. Measured, s_j = (√d_j / w_j²)^(1/4) is better
(docs/findings.md): steps follow the largest weight of a block, and not the mean square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError, GGUFError, PlanError
from ramgguf.core.files import refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import by_expert, default_threads, map_chunks, runs
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.evaluate import score_held_out, scores_here
from ramgguf.gguf.architecture import is_of_experts, never_quantized
from ramgguf.gguf.folds import Fold, folds, is_vector
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.gguf.writer import rewrite
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.imatrix import Imatrix, load_imatrix
from ramgguf.quants.roundtrip import SOURCES
from ramgguf.quants.scales import ScaledFile, Scales, write_scales

Doubles = NDArray[np.float64]

STRENGTH = 0.5  # the exponent of d_j
LEAST = 1e-6  # of the mean square: what inputs and columns have at least
MOST = 16.0  # times the geometric mean, and 1 / 16 of it at least
# Nats per token: rounding scaled weights to F16 and BF16 moves the KLD less, a wrong scale more.
EXACT = 1e-3
# With experts, rounding makes routers choose others for some tokens, and that moves it up to here.
# Scales that round nothing then tell whether the graph is as expected.
CHOICES = 0.1
CHECK_CTX = 64


@dataclass(frozen=True)
class Transformed:
    """The file of scales, how many tensors have some, and the KLD in nats per token of the scaled
    model to the model, as far as it was measured.
    """

    path: Path
    n_folds: int
    n_tensors: int
    kld: float | None


@protected()
def transform(
    model: str | Path,
    output: Path,
    imatrix: str | Path,
    *,
    strength: float = STRENGTH,
    check: bool = True,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Transformed:
    """Write scales for the model's columns, chosen by its importance matrix.

    With these scales the model computes the same, and quantizes better; `quantize` takes the file.
    strength is the exponent of the inputs' mean squares. With check, where llama.cpp is installed,
    the scaled model is written into a scratch folder beside the output, and compared
    with the model on a few hundred tokens.

    Raises PlanError for a model in which no scale can move (another architecture, quantized
    weights), or that computes something else with them; GGUFError, ImatrixError, EngineError.
    """
    if not 0 <= strength <= 2:
        raise PlanError(f"strength {strength}: expected 0 to 2")
    refuse_existing(output, force=force, error=GGUFError)
    weighed = load_imatrix(Path(imatrix))
    with open_gguf(local_path(model), kind_check=True) as file:
        n_threads = threads or default_threads()
        moves = _chosen(file, weighed, strength, n_threads)
        scales = _spread(file, output, moves)
        kld = None
        if check and scores_here():
            departure = partial(_departure, file, threads=n_threads, progress=progress or Silent())
            kld = departure(scales)
            is_same = kld <= EXACT
            if not is_same and kld <= CHOICES and _chooses_experts(file):
                is_same = departure(_spread(file, output, _exact(moves))) <= EXACT
                if is_same:
                    announce(
                        "rounding changes which experts some tokens use; with powers of two as "
                        "scales, the model computes the same"
                    )
            if not is_same:
                raise PlanError(
                    f"{file.paths[0]}: with scales, it computes something else (KLD {kld:.2g} nats "
                    f"per token, expected {EXACT:g} at most); quantize it without"
                )
        elif check:
            announce("not checked: llama-cpp-python is missing (pip install 'ramgguf[eval]')")
        write_scales(scales, force=force)
    return Transformed(output, len(moves), len({*scales.columns, *scales.rows}), kld)


def can_scale(file: GGUFFile) -> bool:
    """Return whether a scale can move in the model."""
    return any(_is_plain(file, fold) for fold in folds(file))


def most_checks(file: GGUFFile) -> int:
    """Return how often transform runs the scaled model at most: 0 where no scale can move in it.

    Experts may be chosen otherwise by rounding alone, which a second run tells apart.
    """
    if not can_scale(file):
        return 0
    return 2 if _chooses_experts(file) else 1


def _chooses_experts(file: GGUFFile) -> bool:
    return any(is_of_experts(t.name) for t in file.tensors)


def _is_plain(file: GGUFFile, fold: Fold) -> bool:
    return all(file.tensor(n).type_name in SOURCES for n in (*fold.writers, *fold.readers))


# Folds, and the scale of each of their rows, (n_experts, n_rows).
Moves = list[tuple[Fold, Doubles]]


def _chosen(file: GGUFFile, weighed: Imatrix, strength: float, threads: int) -> Moves:
    """Return the folds of which the matrix has entries, and their scales."""
    moves: Moves = []
    for fold in folds(file):
        inputs = _inputs(file, fold, weighed)
        if inputs is not None and _is_plain(file, fold):
            squares = _column_squares(file, fold, threads)
            moves.append((fold, _scales(fold, inputs, squares, strength)))
    if not moves:
        raise PlanError(
            f"{file.paths[0]}: no scale can move in it: of the architecture {file.architecture}, "
            "either the graph is not known, weights are quantized, or the matrix has no entries"
        )
    return moves


def _exact(moves: Moves) -> Moves:
    """Return the folds with powers of two at random, by which no type rounds."""
    rng = np.random.default_rng(0)
    return [(fold, np.exp2(rng.integers(-1, 2, by_row.shape))) for fold, by_row in moves]


def _spread(file: GGUFFile, path: Path, moves: Moves) -> Scales:
    """Return the scales of tensors, for a file at path."""
    columns: dict[str, Doubles] = {}
    rows: dict[str, Doubles] = {}
    for fold, by_row in moves:
        by_column = by_row[:, fold.row_of]
        for name in fold.readers:
            own = by_column if fold.n_experts > 1 else by_column[0]
            columns[name] = columns.get(name, 1.0) * own
        for name in fold.writers:
            side = columns if is_vector(file.tensor(name)) else rows
            side[name] = side.get(name, 1.0) / by_row.reshape(-1)
    return Scales(path, _floats(columns), _floats(rows), file.sample_sha256)


def _floats(scales: dict[str, Doubles]) -> dict[str, NDArray[np.float32]]:
    return {name: values.astype(np.float32) for name, values in scales.items()}


def _inputs(file: GGUFFile, fold: Fold, weighed: Imatrix) -> Doubles | None:
    """Return d_j of the readers' inputs, (n_experts, n_columns); None where there is no entry.

    Where experts share the scales, it is the mean over them.
    """
    readers = (file.tensor(name) for name in fold.readers)
    entries = (weighed.importance(reader.name, reader.shape) for reader in readers)
    found = next((entry for entry in entries if entry is not None), None)
    if found is None or fold.n_experts > 1:
        return None if found is None else found.astype(np.float64)
    mean: Doubles = found.mean(axis=0, dtype=np.float64, keepdims=True)
    return mean


def _column_squares(file: GGUFFile, fold: Fold, threads: int) -> Doubles:
    """Return the readers' Σ w² of each column, (n_experts, n_columns), each reader's over its sum.

    Readers that are kept in full, as routers are, have no errors and no say.
    """

    def of_reader(tensor: TensorInfo) -> Doubles:
        per_expert = tensor.n_rows // fold.n_experts

        def of_rows(start: int, stop: int) -> list[tuple[int, Doubles]]:
            rows = file.read_rows(tensor, start, stop)
            weights = decode_rows(tensor.type_name, rows, tensor.row_length)
            return [
                (expert, np.einsum("ij,ij->j", weights[part], weights[part], dtype=np.float64))
                for expert, part in by_expert(start, stop, per_expert)
            ]

        squares = np.zeros((fold.n_experts, tensor.row_length))
        parts = map_chunks(lambda c: of_rows(c.start, c.stop), runs([tensor]), threads)
        for expert, found in chain.from_iterable(parts):
            squares[expert] += found
        sums: Doubles = squares.sum(axis=1, keepdims=True)
        return squares / np.maximum(sums, np.finfo(np.float64).tiny)

    readers = [file.tensor(name) for name in fold.readers]
    counted = [t for t in readers if not never_quantized(t.name, t.shape, file.architecture)]
    squares: Doubles = reduce(np.add, map(of_reader, counted or readers))
    return squares


def _scales(fold: Fold, inputs: Doubles, weights: Doubles, strength: float) -> Doubles:
    """Return the scale of each of the writers' rows, (n_experts, n_rows), geometric mean 1."""
    each = zip(inputs, weights, strict=True)
    return np.stack([_of_expert(fold, d, squares, strength) for d, squares in each])


def _of_expert(fold: Fold, inputs: Doubles, weights: Doubles, strength: float) -> Doubles:
    """Return the scale of each row, (n_rows,).

    Columns that one row makes have one scale: that of their geometric means.
    """

    def logs(squares: Doubles) -> Doubles:
        floor = LEAST * float(squares.mean()) or 1.0
        found: Doubles = np.log(np.maximum(squares, floor))
        return found

    wanted = (strength * logs(inputs) - logs(weights)) / 4
    counts = np.bincount(fold.row_of, minlength=fold.n_rows)
    by_row = np.bincount(fold.row_of, wanted, fold.n_rows) / np.maximum(counts, 1)
    by_row -= by_row.mean()
    found: Doubles = np.exp(np.clip(by_row, -np.log(MOST), np.log(MOST)))
    return found


def _departure(file: GGUFFile, scales: Scales, threads: int, progress: Progress) -> float:
    """Return the KLD of the scaled model to the model, in nats per token."""
    scaled = ScaledFile(file, scales)
    with scratch_folder(scales.path.absolute().parent, error=EngineError) as folder:
        layout = plan_layout(
            folder / "scaled.gguf", file, {t.name: t.type_name for t in file.tensors}, {}
        )
        path = rewrite(
            layout, scaled, lambda _, rows: rows, stage="scale", threads=threads, progress=progress
        )
        return departure(path, file.paths[0], threads=threads, progress=progress)


def departure(changed: Path, model: Path, *, threads: int, progress: Progress) -> float:
    """Return the KLD of a changed model to the model, in nats per token of short windows.

    EXACT is what rounding alone stays below. Raises EngineError, GGUFError.
    """
    (score,) = score_held_out(
        [changed], model, part="gate", n_ctx=CHECK_CTX, max_rounds=1, seconds=None,
        threads=threads, progress=progress,
    )  # fmt: skip
    return score.overall().kld.value
