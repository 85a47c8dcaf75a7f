"""Copies of GGUF files through the output of the package, block by block, for tests."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.layout import Overrides, plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.gguf.writer import GGUFOutput

CHUNK_BYTES = 1 << 24


def write_gguf(
    path: Path,
    source: GGUFFile,
    tensor_types: Mapping[str, str],
    overrides: Overrides,
    blocks: Callable[[TensorInfo, str], Iterable[bytes | NDArray[Any]]],
    *,
    force: bool = False,
    split_max_bytes: int | None = None,
) -> tuple[Path, ...]:
    """Write the source with other types and return the paths of what was written.

    blocks yields the encoded bytes of a tensor in a type, front to back; it is asked only for the
    tensors whose type changes, the others are copied.
    """
    layout = plan_layout(path, source, tensor_types, overrides, split_max_bytes=split_max_bytes)
    with GGUFOutput(layout, source, force=force) as output:
        for tensor in source.tensors:
            type_name = layout.tensors[tensor.name].type_name
            if type_name == tensor.type_name:
                copy(output, source, tensor)
                continue
            offset = 0
            for data in blocks(tensor, type_name):
                output.write_at(tensor.name, offset, data)
                offset += data.nbytes if isinstance(data, np.ndarray) else len(data)
        return output.commit()


def copy(output: GGUFOutput, source: GGUFFile, tensor: TensorInfo) -> None:
    """Write the tensor's bytes as they stand in the source."""
    step = max(1, CHUNK_BYTES // tensor.row_bytes)
    for start in range(0, tensor.n_rows, step):
        rows = source.read_rows(tensor, start, min(start + step, tensor.n_rows))
        output.write_at(tensor.name, start * tensor.row_bytes, rows)
