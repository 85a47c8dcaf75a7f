"""Sums over the inputs of a model's weights, for every decode.

llama.cpp's scheduler asks the tap about every node of a graph before and after computing it
(cb_eval of the context's parameters). For a matrix multiplication with a wanted weight the float32
input is added up: Σx² per column, per expert where a router chooses, and on request XᵀX.
"""

import ctypes
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.llama import ggml
from ramgguf.llama.system import llama_module

Floats = NDArray[np.float32]


@dataclass
class Sums:
    """Σx² of one weight's input: squares (n_experts, n_columns); counts, the number of rows x.

    counts has one entry per expert that a router chooses among, else a single one.
    """

    squares: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass
class Taken:
    """What a tap has added up, by the weight's name.

    owners names, for each weight without experts, the first that has the same input in every
    graph: one XᵀX serves them all.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    grams: dict[str, Floats] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)


class Tap:
    """An evaluation callback for llama.cpp, and what it has added up.

    It sees the weights of these names; of those in grams, owners of their inputs, XᵀX, too.
    Hand `callback` to a context, and call check after each decode: an exception cannot pass
    through llama.cpp, so it is kept until then.
    """

    def __init__(self, names: Collection[str], grams: Collection[str] = ()) -> None:
        self._operations = ggml.check_layout()
        self._names = {name.encode(): name for name in names}
        self._grams = frozenset(grams)
        self._failure: Exception | None = None
        self._seen: dict[int, str] = {}  # by the input's address in this graph, its first weight
        self.taken = Taken()
        self.callback: Any = llama_module().ggml_backend_sched_eval_callback(self._called)

    def check(self) -> None:
        """Raise what went wrong in the callback, and be ready for the next graph."""
        self._seen.clear()
        if self._failure is not None:
            raise self._failure

    def _called(self, pointer: int, ask: bool, _user_data: object) -> bool:
        """Answer llama.cpp: whether the node is wanted, or, once it is computed, to go on."""
        try:
            node = ctypes.cast(pointer, ggml.TensorPointer).contents
            name = self._wanted(node)
            if name is not None and not ask:
                self._take(name, node)
        except Exception as e:
            self._failure = self._failure or e
            return False
        return not ask or name is not None

    def _wanted(self, node: Any) -> str | None:
        operations = (self._operations.mul_mat, self._operations.mul_mat_id)
        if self._failure is not None or node.op not in operations:
            return None
        return self._names.get(node.src[0].contents.name)

    def _take(self, name: str, node: Any) -> None:
        weight, x = node.src[0].contents, ggml.read_array(node.src[1], np.float32)
        n_matrices = weight.ne[2] * weight.ne[3]
        sums = self.taken.sums.get(name)
        routed = node.op == self._operations.mul_mat_id
        if sums is None:
            shape = (n_matrices, weight.ne[0])
            counts = np.zeros(n_matrices if routed else 1, np.int64)
            sums = self.taken.sums[name] = Sums(np.zeros(shape), counts)
        if routed:
            add_routed(sums, x, ggml.read_array(node.src[2], np.int32))
        else:
            add_dense(sums, x, (weight.ne[3], weight.ne[2]))
        if routed or n_matrices > 1:
            return
        owner = self._seen.setdefault(ggml.address(node.src[1]), name)
        if self.taken.owners.setdefault(name, owner) != owner:
            self.taken.owners[name] = name  # they part in some graphs
        if name in self._grams:
            n = x.shape[-1]
            gram = self.taken.grams.setdefault(name, np.zeros((n, n), np.float32))
            _core.add_gram(np.ascontiguousarray(x.reshape(-1, n)), gram)


def add_dense(sums: Sums, x: Floats, matrices: tuple[int, int]) -> None:
    """Add a multiplication by matrices of (ne[3], ne[2]); x has ggml's dimensions, last first.

    Where x has more matrices than the weight, they are taken in turn; a weight of two dimensions
    takes them all.
    """
    n_outer, n_inner = matrices
    for outer, inner in np.ndindex(x.shape[:2]):
        number = outer % n_outer * n_inner + inner % n_inner
        sums.squares[number] += _sum_squares(x[outer, inner])
    sums.counts += x.shape[0] * x.shape[1] * x.shape[2] // len(sums.squares)


def add_routed(sums: Sums, x: Floats, ids: NDArray[np.int32]) -> None:
    """Add a multiplication by experts.

    x has shape (1, tokens, slots or 1, columns), ids (1, 1, tokens, slots): the experts chosen.
    """
    chosen = ids[0, 0]
    for slot in range(chosen.shape[1]):
        rows = x[0, :, slot % x.shape[2]]
        for expert in np.unique(chosen[:, slot]):
            mine = chosen[:, slot] == expert
            sums.squares[expert] += _sum_squares(rows[mine])
            sums.counts[expert] += np.count_nonzero(mine)


def _sum_squares(x: Floats) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.square(x, dtype=np.float64).sum(axis=0)
    return total
