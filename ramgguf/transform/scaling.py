"""Which scales to take: those with which blocks of weights lose least of the outputs.

A block's weights share a step, which grows with them: the step squared times the number of weights
goes as Σ w_j² s_j², and what the outputs lose as that times Σ d_j / s_j², where d_j is the mean
square of input j, and w_j² that of column j. It is least for s_j = (d_j / w_j²)^(1/4), in each
block up to a factor that changes nothing. Measured, s_j = (√d_j / w_j²)^(1/4) is better
(docs/findings.md): steps follow the largest weight of a block, and not the mean square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError, GGUFError, PlanError
from ramgguf.core.files import refuse_existing
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads, map_chunks, runs
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.scratch import scratch_folder
from ramgguf.evaluate import score_held_out, scores_here
from ramgguf.gguf.folds import Fold, folds
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, open_gguf
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
        scales, n_folds = _chosen(file, output, weighed, strength, threads or default_threads())
        kld = None
        if check and scores_here():
            kld = _departure(file, scales, threads or default_threads(), progress or Silent())
            if not kld <= EXACT:
                raise PlanError(
                    f"{file.paths[0]}: with scales, it computes something else (KLD {kld:.2g} nats "
                    f"per token, expected {EXACT:g} at most); quantize it without"
                )
        elif check:
            announce("not checked: llama-cpp-python is missing (pip install 'ramgguf[eval]')")
        write_scales(scales, force=force)
    return Transformed(output, n_folds, len({*scales.columns, *scales.rows}), kld)


def can_scale(file: GGUFFile) -> bool:
    """Return whether a scale can move in the model."""
    return any(_is_plain(file, fold) for fold in folds(file))


def _is_plain(file: GGUFFile, fold: Fold) -> bool:
    return all(file.tensor(n).type_name in SOURCES for n in (*fold.writers, *fold.readers))


def _chosen(
    file: GGUFFile, path: Path, weighed: Imatrix, strength: float, threads: int
) -> tuple[Scales, int]:
    """Return the scales, and the number of folds that have some."""
    columns: dict[str, Doubles] = {}
    rows: dict[str, Doubles] = {}
    n_folds = 0
    for fold in folds(file):
        inputs = _inputs(file, fold, weighed)
        if inputs is None or not _is_plain(file, fold):
            continue
        n_folds += 1
        by_row = _scales(fold, inputs, _column_squares(file, fold, threads), strength)
        for name in fold.readers:
            columns[name] = columns.get(name, 1.0) * by_row[fold.row_of]
        for name in fold.writers:
            is_vector = file.tensor(name).n_rows == 1
            side = columns if is_vector else rows
            side[name] = side.get(name, 1.0) / by_row
    if not n_folds:
        raise PlanError(
            f"{file.paths[0]}: no scale can move in it: of the architecture {file.architecture}, "
            "either the graph is not known, weights are quantized, or the matrix has no entries"
        )
    return Scales(path, _floats(columns), _floats(rows), file.sample_sha256), n_folds


def _floats(scales: dict[str, Doubles]) -> dict[str, NDArray[np.float32]]:
    return {name: values.astype(np.float32) for name, values in scales.items()}


def _inputs(file: GGUFFile, fold: Fold, weighed: Imatrix) -> Doubles | None:
    """Return d_j of the readers' inputs, (n_columns,); None where the matrix has no entry."""
    reader = file.tensor(fold.readers[0])
    found = weighed.importance(reader.name, reader.shape)
    return None if found is None else found[0].astype(np.float64)


def _column_squares(file: GGUFFile, fold: Fold, threads: int) -> Doubles:
    """Return the readers' Σ w² of each column, (n_columns,), each reader's over its sum."""

    def of_reader(name: str) -> Doubles:
        tensor = file.tensor(name)

        def of_rows(start: int, stop: int) -> Doubles:
            rows = file.read_rows(tensor, start, stop)
            weights = decode_rows(tensor.type_name, rows, tensor.row_length)
            found: Doubles = np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
            return found

        parts = map_chunks(lambda c: of_rows(c.start, c.stop), runs([tensor]), threads)
        squares: Doubles = reduce(np.add, parts)
        return squares / max(float(squares.sum()), np.finfo(np.float64).tiny)

    return reduce(np.add, (of_reader(name) for name in fold.readers))


def _scales(fold: Fold, inputs: Doubles, weights: Doubles, strength: float) -> Doubles:
    """Return the scale of each of the writers' rows, (n_rows,), geometric mean 1.

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
        (score,) = score_held_out(
            [path], file.paths[0], part="gate", n_ctx=CHECK_CTX, max_rounds=1, seconds=None,
            threads=threads, progress=progress,
        )  # fmt: skip
    return score.overall().kld.value
