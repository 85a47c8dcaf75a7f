"""Where a scale can move from a matrix into what makes its inputs, and nothing else changes.

The columns of a matrix are multiplied with a vector, and whatever makes its inputs is divided by
it: the gain of a norm, or the rows of a matrix that acts linearly. In a layer of a transformer
these are the norm before attention (for Q, K and V), that before the feed-forward network (for gate
and up), up (for down: the gate's activation only multiplies it) and V (for the output projection:
attention mixes tokens, not channels).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.architecture import PARTS, layer_of, part_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo

# Graphs in which only the weights that stand in the table of parts read a norm before attention or
# the feed-forward network (src/models of llama.cpp).
ARCHITECTURES = frozenset(
    {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "smollm3", "olmo2"}
)
# Parts of a layer for which one of the four places is something else: experts and their routers,
# norms and gates between V and its projection.
_UNKNOWN = ("ffn_gate_inp", "attn_gate", "attn_sub_norm", "attn_v_norm", "ffn_sub_norm", "ssm")


@dataclass(frozen=True)
class Fold:
    """Scales of the columns of `readers`, by which rows of `writers` (or a vector) are divided.

    writers are tensors with as many rows, or of as many values; row_of says for each column which
    row makes it, (n_columns,).
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    row_of: NDArray[np.intp]

    @property
    def n_rows(self) -> int:
        """Rows of the writers: scales that can be chosen."""
        return int(self.row_of.max()) + 1


def folds(file: GGUFFile) -> tuple[Fold, ...]:
    """Return the folds of the model's layers; none for an architecture that is not known."""
    if file.architecture not in ARCHITECTURES:
        return ()
    layers: dict[int, dict[str, str]] = {}
    for tensor in file.tensors:
        layer = layer_of(tensor.name)
        if layer is not None:
            layers.setdefault(layer, {})[part_of(tensor.name, file.architecture)] = tensor.name
    found = (
        fold
        for parts in layers.values()
        if not any(part.startswith(_UNKNOWN) for part in parts)
        for fold in _of_layer(file, parts)
    )
    return tuple(fold for fold in found if _fits(file, fold))


def _fits(file: GGUFFile, fold: Fold) -> bool:
    """Return whether the tensors have the shapes that the fold takes for granted."""
    readers = [file.tensor(name) for name in fold.readers]
    writers = [file.tensor(name) for name in fold.writers]
    n = len(fold.row_of)
    fit_rows = (fold.n_rows == (t.row_length if is_vector(t) else t.n_rows) for t in writers)
    return all(t.shape[0] == n and math.prod(t.shape[2:]) == 1 for t in readers) and all(fit_rows)


def is_vector(tensor: TensorInfo) -> bool:
    """Return whether the tensor has one dimension: a gain or a bias."""
    return tensor.n_rows == 1


def _of_layer(file: GGUFFile, parts: dict[str, str]) -> Iterator[Fold]:
    """Yield the folds of a layer; parts are its tensors' names, a bias's as NAME.bias."""
    for norm, reads in (("attn_norm", "attention"), ("ffn_norm", "feed forward")):
        readers = tuple(
            name for part, name in parts.items() if part in PARTS and PARTS[part].reads == reads
        )
        if norm in parts and readers:
            yield Fold(_with_bias(parts, norm), readers, _each(file, readers[0]))
    if {"ffn_gate", "ffn_up", "ffn_down"} <= parts.keys():
        down = parts["ffn_down"]
        yield Fold(_with_bias(parts, "ffn_up"), (down,), _each(file, down))
    if {"attn_v", "attn_output"} <= parts.keys():
        heads = _heads(file, parts["attn_v"], parts["attn_output"])
        if heads is not None:
            yield Fold(_with_bias(parts, "attn_v"), (parts["attn_output"],), heads)


def _with_bias(parts: dict[str, str], part: str) -> tuple[str, ...]:
    bias = f"{part}.bias"
    return (parts[part], parts[bias]) if bias in parts else (parts[part],)


def _heads(file: GGUFFile, v: str, output: str) -> NDArray[np.intp] | None:
    """Return which row of V each column of the projection comes from; None where heads are unknown.

    Heads that share a V follow one another.
    """
    arch, n_rows = file.architecture, file.tensor(v).n_rows
    n_columns = file.tensor(output).row_length
    size = file.metadata.integer(f"{arch}.attention.value_length")
    if size is None:
        n_heads = file.metadata.integer(f"{arch}.attention.head_count")
        size = n_columns // n_heads if n_heads else None
    if not size or n_rows % size or n_columns % n_rows:
        return None
    columns = np.arange(n_columns)
    head, within = columns // size, columns % size
    return head // (n_columns // n_rows) * size + within


def _each(file: GGUFFile, reader: str) -> NDArray[np.intp]:
    """Return each column's own number: row i makes column i."""
    return np.arange(file.tensor(reader).row_length)
