"""Sums over the inputs of a model's weights, for every decode.

llama.cpp's scheduler asks the tap about every node of a graph before and after computing it
(cb_eval of the context's parameters). For a matrix multiplication with a wanted weight the float32
input is added up: Σx² per column, per expert where a router chooses, and on request XᵀX.

Rows for XᵀX are kept until there are a few hundred, and added after the decode by all threads:
adding few rows costs nearly as much. A pass that needs no logits ends before the head.
"""

import ctypes
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.architecture import layer_of
from ramgguf.llama import ggml
from ramgguf.llama.eval_callback import EvalCallback
from ramgguf.quants.hessian import add_grams, mirror

Floats = NDArray[np.float32]

_GRAM_ROWS = 256  # kept for an XᵀX before they are added


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


@dataclass(frozen=True)
class TapState:
    """All that a tap goes on from: what was taken, rows that wait to be added to XᵀX, by the
    weight's name, and the name of the node that is the head's input, once it is known.
    """

    taken: Taken
    rows: dict[str, Floats]
    head_input: bytes | None


class Tap(EvalCallback):
    """An evaluation callback for llama.cpp, and what it has added up.

    It sees the weights of these names; of those in grams, owners of their inputs, XᵀX, too, added
    by n_threads threads. Call check after each decode.

    draft_layers are those that draft tokens; while is_drafting is set, no other weights are seen:
    what they read then is not the text.

    head is the weight that makes the logits: while skips_head is set, a graph ends once the head's
    input is computed, and what is read of its logits is no number.
    """

    def __init__(
        self,
        names: Collection[str],
        grams: Collection[str] = (),
        *,
        head: str | None = None,
        draft_layers: Collection[int] = (),
    ) -> None:
        super().__init__()
        self._names = {name.encode(): name for name in names}
        self._grams = frozenset(grams)
        self._drafts = frozenset(n for n in names if layer_of(n) in draft_layers)
        self.is_drafting = False
        self.n_threads = 1
        self._seen: dict[int, str] = {}  # by the input's address in this graph, its first weight
        self._squares: dict[int, NDArray[np.float64]] = {}  # by the same, Σx²
        self._rows: dict[str, list[Floats]] = {}
        self._taken = Taken()
        self._head = _Head(head)
        self.skips_head = False

    @property
    def taken(self) -> Taken:
        """What was added up so far."""
        self._add_grams(1)
        for gram in self._taken.grams.values():
            mirror(gram)
        return self._taken

    def state(self) -> TapState:
        """Return what the tap goes on from, between two decodes; arrays are the tap's own."""
        rows = {name: np.concatenate(kept) for name, kept in self._rows.items()}
        return TapState(self._taken, rows, self._head.input)

    def restore(self, state: TapState) -> None:
        """Go on from what another tap on the same weights had taken."""
        self._taken = state.taken
        self._rows = {name: [rows] for name, rows in state.rows.items()}
        self._head.input = state.head_input

    def check(self) -> None:
        """Raise what went wrong in the callback, and be ready for the next graph."""
        self._seen.clear()
        self._squares.clear()
        self._head.graph_ended()
        self.raise_failure()
        self._add_grams(_GRAM_ROWS)

    def _add_grams(self, n_rows: int) -> None:
        """Add the rows that are kept to XᵀX where there are n_rows of them."""
        ready = [n for n, kept in self._rows.items() if sum(map(len, kept)) >= n_rows]
        if ready:
            grams = self._taken.grams
            pairs = ((np.concatenate(self._rows.pop(name)), grams[name]) for name in ready)
            add_grams(pairs, self.n_threads)

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        node = tensor.contents
        ends = self.skips_head and self._head.is_input(node)
        name = self._wanted(node)
        if ask:
            self._head.asked(node)
            return ends or name is not None
        if name is not None:
            self._take(name, node)
        if ends:
            self._take_head(tensor)
        return not ends

    def _wanted(self, node: Any) -> str | None:
        if node.op not in self._multiplications:
            return None
        weight: bytes = node.src[0].contents.name
        name = self._names.get(weight)
        if self.is_drafting:
            return name if name in self._drafts else None
        self._head.multiplied(weight, node)
        return name

    def _take_head(self, x: Any) -> None:
        """Take the head's input, which is computed; the head is not."""
        name = self._head.name
        if name is not None and name.encode() in self._names:
            assert name in self._taken.sums  # the graph before this one computed the head
            self._add(name, ggml.read_array(x, np.float32), ctypes.addressof(x.contents), (1, 1))

    def _take(self, name: str, node: Any) -> None:
        weight, x = node.src[0].contents, ggml.read_array(node.src[1], np.float32)
        n_matrices = weight.ne[2] * weight.ne[3]
        routed = node.op == self._routed
        if name not in self._taken.sums:
            shape = (n_matrices, weight.ne[0])
            counts = np.zeros(n_matrices if routed else 1, np.int64)
            self._taken.sums[name] = Sums(np.zeros(shape), counts)
        if routed:
            add_routed(self._taken.sums[name], x, ggml.read_array(node.src[2], np.int32))
        else:
            self._add(name, x, ggml.address(node.src[1]), (weight.ne[3], weight.ne[2]))

    def _add(self, name: str, x: Floats, at: int, matrices: tuple[int, int]) -> None:
        """Add an input that lies at this address in the graph to what was taken of the weight."""
        sums = self._taken.sums[name]
        if matrices != (1, 1):
            add_dense(sums, x, matrices)
            return
        n = x.shape[-1]
        if at not in self._squares:
            self._squares[at] = _sum_squares(x.reshape(-1, n))
        sums.squares[0] += self._squares[at]
        sums.counts += x.size // n
        owner = self._seen.setdefault(at, name)
        if self._taken.owners.setdefault(name, owner) != owner:
            self._taken.owners[name] = name  # they part in some graphs
        if name in self._grams:
            self._taken.grams.setdefault(name, np.zeros((n, n), np.float32))
            self._rows.setdefault(name, []).append(np.ascontiguousarray(x.reshape(-1, n)))


class _Head:
    """Where in a graph the weight that makes the logits gets its input.

    The first graph that computes it tells the name of the node that is its input. A name that other
    nodes have, or that ggml numbers through, is not kept: then no graph ends early.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.input: bytes | None = None
        self._found: bytes | None = None
        self._asked: Counter[bytes] = Counter()

    def asked(self, node: Any) -> None:
        """Count the node's name, until the input is found."""
        if self.name is not None and self.input is None:
            self._asked[node.name] += 1

    def multiplied(self, weight: bytes, node: Any) -> None:
        """Keep the name of the input where the weight is the head."""
        if self.name is not None and self.input is None and weight == self.name.encode():
            self._found = node.src[1].contents.name

    def graph_ended(self) -> None:
        """Settle on the input that this graph had."""
        if self._found and self._asked[self._found] == 1 and not self._found.startswith(b"node_"):
            self.input = self._found
        self._asked.clear()
        self._found = None

    def is_input(self, node: Any) -> bool:
        """Return whether the node computes the head's input."""
        return self.input is not None and node.name == self.input


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
