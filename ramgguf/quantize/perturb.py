"""From a model and a Plan to the model with noise as large as the plan's quantization errors.

A control for "does quantization regularize": Gaussian noise with, for every row, the root mean
square of that row's own quantization error. Noisy tensors are written in F32, so that no rounding
comes on top.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import Chunk, default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.version import __version__
from ramgguf.gguf.header import string, u32
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.gguf.writer import rewrite
from ramgguf.plan.result import Assignment, Plan
from ramgguf.quantize.write import check_source
from ramgguf.quants import grids
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.imatrix import planned_imatrix

_ALL_F32 = 0  # llama.cpp's file type


def perturb_file(
    file: GGUFFile,
    plan: Plan,
    output: Path,
    *,
    seed: int,
    force: bool,
    threads: int,
    progress: Progress,
) -> Path:
    """Write the model with noise in every tensor that the plan quantizes; return its path.

    The plan's source has been checked. The same seed gives the same noise for any number of
    threads. Raises GGUFError when the output cannot be written.
    """
    imatrix = planned_imatrix(plan.imatrix)
    noisy = {a.name for a in plan.assignments if a.format != a.source_format}
    overrides = {
        "general.file_type": u32(_ALL_F32),
        "ramgguf.version": string(__version__),
        "ramgguf.noise_like": string(plan.sha256()),
        "ramgguf.noise_seed": u32(seed),
    }
    types = {t.name: "F32" if t.name in noisy else t.type_name for t in file.tensors}
    layout = plan_layout(output, file, types, overrides)

    def convert(chunk: Chunk, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        tensor, planned = file.tensors[chunk.index], plan.assignments[chunk.index]
        if tensor.name not in noisy:
            return rows
        scale = ErrorWeights.of(tensor, imatrix)
        rng = np.random.default_rng([seed, chunk.index, chunk.start])
        return _noisy(rows, chunk.start, tensor.row_length, planned, scale, plan.encoder, rng)

    return rewrite(
        layout, file, convert, stage="perturb", force=force, threads=threads, progress=progress
    )


def _noisy(
    rows: NDArray[np.uint8],
    start: int,
    row_length: int,
    planned: Assignment,
    scale: ErrorWeights,
    encoder: str,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Return the rows in F32, each with noise of its own quantization error's root mean square."""
    if planned.is_exact:
        blocks = grids.encode(planned.format, planned.source_format, rows)
    else:
        blocks = scale.encode(
            planned.format, planned.source_format, rows, start, row_length, encoder
        )
    weights = decode_rows(planned.source_format, rows, row_length)
    rounded = decode_rows(planned.format, blocks, row_length)
    rms = np.sqrt(np.mean(np.square(weights - rounded, dtype=np.float64), axis=1))
    noise = rng.standard_normal(weights.shape, np.float32) * rms[:, None].astype(np.float32)
    return np.ascontiguousarray(weights + noise).view(np.uint8)


@protected()
def perturb(
    model: str | Path,
    like: Plan | str | Path,
    output: str | Path,
    *,
    seed: int = 0,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the model with Gaussian noise as large as a plan's quantization errors, row by row.

    Tensors with noise are in F32. Raises PlanError when the plan is another model's, GGUFError when
    the output cannot be written.
    """
    plan = like if isinstance(like, Plan) else Plan.load(Path(like))
    if plan.imatrix is not None and plan.imatrix.scales_path is not None:
        raise PlanError(
            f"the plan's errors are those of the model with {plan.imatrix.scales_path}; plan "
            "without scales"
        )
    with open_gguf(local_path(model), kind_check=True) as file:
        check_source(file, plan)
        return perturb_file(
            file,
            plan,
            Path(output),
            seed=seed,
            force=force,
            threads=threads or default_threads(),
            progress=progress or Silent(),
        )
