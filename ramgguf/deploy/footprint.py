"""The memory that a model takes: llama.cpp's own figures, or an estimate where it has none."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import BudgetError, EngineError
from ramgguf.deploy.footprint_formula import N_UBATCH, ContextShape, cache_bytes, compute_bytes
from ramgguf.gguf.architecture import TOKEN_EMBEDDING
from ramgguf.gguf.layout import encoded_bytes
from ramgguf.gguf.reader import GGUFFile
from ramgguf.gguf.stub_model import stub_model
from ramgguf.llama.child import Child
from ramgguf.llama.sizes import Sizes, SizesOf
from ramgguf.plan import Sites
from ramgguf.plan.result import MemoryUse

CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")

# Measured with llama-cpp-python 0.3.36 on Linux: the interpreter, its packages and libllama take
# 80 MB before a model is loaded, and a vocabulary of 49,152 tokens 18 MB (docs/memory.md).
_PROCESS_BYTES = 90_000_000
_TOKEN_BYTES = 400


def parse_cache_types(text: str) -> tuple[str, str]:
    """Return the types of keys and values that 'q8_0' or 'q8_0,f16' stands for."""
    names = [name.strip().upper() for name in text.split(",")]
    if len(names) > 2 or any(name not in CACHE_TYPES for name in names):
        raise BudgetError(
            f"cache type {text!r} is none; write one of {', '.join(CACHE_TYPES).lower()}, "
            "or two for keys and values: q8_0,f16"
        )
    return names[0], names[-1]


@dataclass(frozen=True)
class Footprint:
    """Bytes in memory: of each layer, of what comes before and after the layers, of the rest.

    layer_weights and layer_cache are by layer; layer_experts is the part of the weights that
    --n-cpu-moe keeps in RAM, and layer_largest the largest tensor. output_copy is what the output
    layer takes again where it is not on the embedding's device (tied embeddings); repacked is what
    it takes again without a GPU, where the CPU's kernels want another layout. compute is
    llama.cpp's largest graph, hidden what a layer gives the next one in a batch.
    """

    shape: ContextShape
    layer_weights: tuple[int, ...]
    layer_cache: tuple[int, ...]
    input_weights: int
    output_weights: int
    output_copy: int
    compute: int
    overhead: int
    method: Literal["llama.cpp", "estimate"]
    why_estimate: str | None = None
    repacked: int = 0
    layer_experts: tuple[int, ...] = ()
    layer_largest: tuple[int, ...] = ()
    hidden: int = 0

    @property
    def n_layers(self) -> int:
        """How many layers there are, those that are not loaded included."""
        return len(self.layer_weights)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers with experts that --n-cpu-moe keeps in RAM."""
        return tuple(i for i, n_bytes in enumerate(self.layer_experts) if n_bytes)

    @property
    def use(self) -> MemoryUse:
        """All of it, without a GPU."""
        return MemoryUse(
            weights=sum(self.layer_weights)
            + self.input_weights
            + self.output_weights
            + self.repacked,
            cache=sum(self.layer_cache),
            compute=self.compute,
            overhead=self.overhead,
        )

    def scaled(self, share: float) -> Self:
        """Return the footprint with this share of every weight's bytes."""
        return replace(
            self,
            layer_weights=tuple(int(share * n) for n in self.layer_weights),
            input_weights=int(share * self.input_weights),
            output_weights=int(share * self.output_weights),
            output_copy=int(share * self.output_copy),
            repacked=int(share * self.repacked),
            layer_experts=tuple(int(share * n) for n in self.layer_experts),
            layer_largest=tuple(int(share * n) for n in self.layer_largest),
        )


class FootprintEstimator:
    """Asks for footprints of one model, as a plan would have it. Use as a context manager.

    llama.cpp answers from a child process; where it cannot, the formula does, and says why.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._stack = contextlib.ExitStack()
        self._child = self._stack.enter_context(Child("ramgguf.llama.sizes"))
        self._stub = contextlib.ExitStack()
        self._stub_of: tuple[Mapping[str, str], str] | None = None
        self._why: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._stub.close()

    def footprint(self, shape: ContextShape, tensor_types: Mapping[str, str]) -> Footprint:
        """Return what the model takes with these types, the source's own for others.

        Raises BudgetError when llama.cpp refuses the cache's types.
        """
        if self._why is None:
            path = self._path(tensor_types)
            try:
                return _footprint(self._file, shape, tensor_types, self._ask(path, shape))
            except EngineError as e:
                self._why = str(e).splitlines()[0]
                self._require_allowed(path, shape, self._why)
        return _estimated(self._file, shape, tensor_types, self._why)

    def _path(self, tensor_types: Mapping[str, str]) -> str:
        """Return the path of a stub model with these types; it is kept until the types change."""
        if self._stub_of is None or self._stub_of[0] != tensor_types:
            self._stub.close()
            path = self._stub.enter_context(stub_model(self._file, tensor_types))
            self._stub_of = (dict(tensor_types), str(path))
        return self._stub_of[1]

    def _require_allowed(self, path: str, shape: ContextShape, why: str) -> None:
        """Raise BudgetError if only the types of the cache are what llama.cpp refuses."""
        if (shape.type_k, shape.type_v) == ("F16", "F16"):
            return
        with contextlib.suppress(EngineError):
            self._ask(path, ContextShape(shape.n_ctx, shape.n_seq))
            raise BudgetError(
                f"{why}, though one of F16 would do; choose another --cache-type, such as "
                f"{shape.type_k.lower()} for both"
            )

    def _ask(self, path: str, shape: ContextShape) -> Sizes:
        return self._child.ask(
            SizesOf(
                path=path,
                n_ctx=shape.n_ctx * shape.n_seq,
                n_seq=shape.n_seq,
                type_k=shape.type_k,
                type_v=shape.type_v,
            ),
            Sizes,
        )


def _footprint(
    file: GGUFFile, shape: ContextShape, tensor_types: Mapping[str, str], sizes: Sizes
) -> Footprint:
    """Return llama.cpp's footprint; the formula only divides it among layers."""
    estimate = _estimated(file, shape, tensor_types, "")
    less = _without_draft(estimate, file)
    with_draft, without = (abs(f.use.weights - sizes.weights) for f in (estimate, less))
    estimate = less if without < with_draft else estimate
    shares = estimate.layer_cache
    if sum(shares) != sizes.cache:
        n, total = len(shares), sum(shares)
        shares = tuple(sizes.cache * s // total if total else sizes.cache // n for s in shares)
        shares = (*shares[:-1], shares[-1] + sizes.cache - sum(shares)) if shares else ()
    more = sizes.weights - estimate.use.weights  # derived or duplicated tensors
    repacked = estimate.output_copy if 0 < estimate.output_copy <= more else 0
    return replace(
        estimate,
        layer_cache=shares,
        output_weights=max(0, estimate.output_weights + more - repacked),
        repacked=repacked,
        compute=sizes.compute,
        overhead=_overhead(file, sizes.n_vocab, shape),
        method="llama.cpp",
        why_estimate=None,
    )


def _without_draft(footprint: Footprint, file: GGUFFile) -> Footprint:
    """Return the footprint without draft layers, which llama.cpp leaves out where it predicts none.

    They count as layers, all the same.
    """
    n_trunk = file.n_trunk_layers

    def trunk(by_layer: tuple[int, ...]) -> tuple[int, ...]:
        return (*by_layer[:n_trunk], *(0 for _ in by_layer[n_trunk:]))

    return replace(
        footprint,
        layer_weights=trunk(footprint.layer_weights),
        layer_cache=trunk(footprint.layer_cache),
        layer_experts=trunk(footprint.layer_experts),
        layer_largest=trunk(footprint.layer_largest),
    )


def _estimated(
    file: GGUFFile, shape: ContextShape, tensor_types: Mapping[str, str], why: str
) -> Footprint:
    n_layers = file.n_layers or 0
    sites = Sites.of((t.name for t in file.tensors), n_layers, tied=file.has_tied_embedding)
    sizes = np.array(
        [encoded_bytes(t, tensor_types.get(t.name, t.type_name)) for t in file.tensors], np.int64
    )

    def of_layers(masked: NDArray[np.int64]) -> tuple[int, ...]:
        return tuple(int(masked[sites.layer == i].sum()) for i in range(n_layers))

    largest = [sizes[sites.layer == i] for i in range(n_layers)]
    n_vocab = next((t.shape[1] for t in file.tensors if t.name == TOKEN_EMBEDDING), 0)
    return Footprint(
        shape=shape,
        layer_weights=of_layers(sizes),
        layer_cache=cache_bytes(file, shape),
        input_weights=int(sizes[sites.layer < 0].sum()),
        output_weights=int(sizes[sites.layer == n_layers].sum()),
        output_copy=int(sizes[sites.is_tied].sum()),
        compute=compute_bytes(file, shape),
        overhead=_overhead(file, n_vocab, shape),
        method="estimate",
        why_estimate=why,
        layer_experts=of_layers(sizes * sites.is_expert),
        layer_largest=tuple(int(own.max(initial=0)) for own in largest),
        hidden=4 * N_UBATCH * (file.metadata.integer(f"{file.architecture}.embedding_length") or 0),
    )


def _overhead(file: GGUFFile, n_vocab: int, shape: ContextShape) -> int:
    """Return the overhead: process, vocabulary, logits, work buffer.

    The work buffer holds one batch's activations as the weights' kernels want them.
    """
    longest_row = max((t.row_length for t in file.tensors if len(t.shape) > 1), default=0)
    logits = 4 * n_vocab * shape.n_seq
    return _PROCESS_BYTES + _TOKEN_BYTES * n_vocab + logits + 2 * N_UBATCH * longest_row
