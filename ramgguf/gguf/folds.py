"""Where a scale can move from a matrix into what makes its inputs, and nothing else changes.

The columns of a matrix are multiplied with a vector, and whatever makes its inputs is divided by
it: the gain of a norm, or the rows of a matrix that acts linearly. In a layer of a transformer
these are the norm before attention (for Q, K and V), that before the feed-forward network (for gate
and up), up (for down: the gate's activation only multiplies it) and V (for the output projection:
attention mixes tokens, not channels). In a layer of experts, all of them, the shared ones and the
router read the norm; up and down are those of each expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.architecture import PARTS, is_of_experts, layer_of, part_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo

# Graphs in which only routers and the weights that stand in the table of parts read a norm before
# attention or the feed-forward network (src/models of llama.cpp), and experts are gated by an
# activation that multiplies up (build_moe_ffn in src/llama-graph.cpp): what selects and weighs
# experts, before them or after them, leaves that alone.
_DENSE = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite", "smollm3", "olmo2")
_MIXTURES = (
    *("qwen2moe", "qwen3moe", "qwen3vlmoe", "olmoe", "granitemoe", "deepseek", "deepseek2"),
    *("dots1", "ernie4_5-moe", "hunyuan-moe", "bailingmoe2", "minimax-m2", "glm4moe", "llama4"),
)
ARCHITECTURES = frozenset((*_DENSE, *_MIXTURES))
# Parts of a layer for which one of the places is something else: norms and gates between V and its
# projection, draft blocks, which no run of the model tests, and experts in a tensor each.
_UNKNOWN = (
    *("attn_gate", "attn_sub_norm", "attn_v_norm", "ffn_sub_norm", "ssm"),
    *("nextn.", "ffn_gate.0", "ffn_up.0", "ffn_down.0"),
)
# The norm before the feed-forward network, where it has another name than ffn_norm.
_FFN_NORMS = {"glm4moe": "post_attention_norm"}
# What reads it, by the table of parts, and what else does.
_FFN_READS = ("feed forward", "experts", "shared experts")
_ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")


@dataclass(frozen=True)
class Fold:
    """Scales of the columns of `readers`, by which rows of `writers` (or a vector) are divided.

    writers are tensors with as many rows, or of as many values; row_of says for each column which
    row makes it, (n_columns,). With n_experts above 1, each expert of the writers makes the inputs
    of the reader's expert of the same number, and has scales of its own. Otherwise experts share
    the columns' scales.
    """

    writers: tuple[str, ...]
    readers: tuple[str, ...]
    row_of: NDArray[np.intp]
    n_experts: int = 1

    @property
    def n_rows(self) -> int:
        """Rows of the writers, or of an expert of them: scales that can be chosen."""
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
    n_written = fold.n_rows * fold.n_experts
    fit_rows = (n_written == (t.row_length if is_vector(t) else t.n_rows) for t in writers)
    experts = (fold.n_experts in (1, t.n_experts) for t in readers)
    plain = (t.n_experts == 1 or is_of_experts(t.name) for t in readers)
    return all(t.shape[0] == n for t in readers) and all((*fit_rows, *experts, *plain))


def is_vector(tensor: TensorInfo) -> bool:
    """Return whether the tensor has one dimension: a gain or a bias."""
    return tensor.n_rows == 1


def _of_layer(file: GGUFFile, parts: dict[str, str]) -> Iterator[Fold]:
    """Yield the folds of a layer; parts are its tensors' names, a bias's as NAME.bias."""
    ffn_norm = _FFN_NORMS.get(file.architecture, "ffn_norm")
    for norm, reads in (("attn_norm", ("attention",)), (ffn_norm, _FFN_READS)):
        readers = tuple(
            name
            for kind in reads
            for part, name in parts.items()
            if part in PARTS and PARTS[part].reads == kind
        )
        if reads == _FFN_READS:
            readers += tuple(parts[router] for router in _ROUTERS if readers and router in parts)
        if norm in parts and readers:
            yield Fold(_with_bias(parts, norm), readers, _each(file, readers[0]))
    for suffix in ("", "_shexp", "_exps"):
        gate, up, down = (f"ffn_{part}{suffix}" for part in ("gate", "up", "down"))
        if {gate, up, down} <= parts.keys() and not (suffix == "_exps" and f"{up}.bias" in parts):
            reader = file.tensor(parts[down])
            each, n_experts = _each(file, reader.name), reader.n_experts
            yield Fold(_with_bias(parts, up), (reader.name,), each, n_experts)
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
