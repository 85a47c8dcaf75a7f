"""Importance matrices written as llama-imatrix writes them, so that llama-quantize takes them.

For every weight NAME: NAME.in_sum2, Σx² per column and expert, and NAME.counts, the number of
inputs of each expert, both F32 (tools/imatrix/imatrix.cpp of llama.cpp, save_imatrix).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.errors import ImatrixError
from ramgguf.gguf_arrays import ArrayFile, Keys
from ramgguf.gguf_values import string, u32


@dataclass(frozen=True)
class InputSquares:
    """Σx² of a weight's input, (n_experts, n_columns), and the inputs that each expert met.

    counts has one entry per expert, or a single one for all.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]


def write_imatrix(
    path: Path,
    entries: Mapping[str, InputSquares],
    *,
    dataset: str,
    n_chunks: int,
    chunk_size: int,
    force: bool,
) -> None:
    """Write the matrix; names are stored in order, weights that met nothing are left out.

    Raises ImatrixError when nothing was met, a sum is not finite or the file cannot be written.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in sorted(entries):
        entry = entries[name]
        if not np.isfinite(entry.sums).all():
            raise ImatrixError(f"{name}: its inputs are NaN or infinite; is the model damaged?")
        if entry.counts.any():
            # A float's range is enough: what is beyond it is no sum of squares of activations.
            limit = float(np.finfo(np.float32).max)
            arrays[f"{name}.in_sum2"] = np.minimum(entry.sums, limit).astype(np.float32)
            arrays[f"{name}.counts"] = entry.counts.astype(np.float32)[:, None]
    if not arrays:
        raise ImatrixError(f"{path}: no weight met any input; is it a language model?")
    keys: Keys = {
        "general.type": string("imatrix"),
        "imatrix.datasets": (dataset,),
        "imatrix.chunk_count": u32(n_chunks),
        "imatrix.chunk_size": u32(chunk_size),
    }
    shapes = {name: array.shape for name, array in arrays.items()}
    with ArrayFile(path, keys, shapes, force=force, error=ImatrixError) as file:
        for name, array in arrays.items():
            file.write(name, array)
        file.commit()
