"""Where the tensors of a model lie, in RAM or in a GPU's memory, by llama.cpp's options.

src/llama-model.cpp counts the layers and, after them, the output layer: the last n_gpu_layers are
offloaded. What tokens only look up stays in RAM; a tied embedding is then kept a second time, as
the output layer. --n-cpu-moe N (common/arg.cpp) keeps the experts of the first N layers in RAM.

Whatever depends on these options asks here: plans by tensor, footprints by layer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.architecture import TOKEN_EMBEDDING, is_input, is_kept_by_cpu_moe, layer_of
from ramgguf.plan.result import Division

_INPUT = -1

Mask = NDArray[np.bool_]


def everything(n_layers: int) -> int:
    """Return the n_gpu_layers that offloads all: the layers and the output layer."""
    return n_layers + 1


def divisions(n_layers: int, expert_layers: Iterable[int] = ()) -> Iterator[Division]:
    """Yield every division that llama.cpp's options can say, the most on the GPU first.

    Of the layers with experts, those of the first stay in RAM, or whole layers do.
    """
    most = everything(n_layers)
    yield Division(n_gpu_layers=most)
    for layer in expert_layers:
        yield Division(n_gpu_layers=most, n_cpu_moe=layer + 1)
    for n in range(most - 1, -1, -1):
        yield Division(n_gpu_layers=n)


@dataclass(frozen=True)
class Offloaded:
    """The layers on the GPU: from `first` on, n_layers being the output layer.

    Experts of the layers before `experts` stay in RAM. Where nothing is offloaded, first is
    n_layers + 1.
    """

    n_layers: int
    first: int
    experts: int

    @classmethod
    def of(cls, division: Division, n_layers: int) -> "Offloaded":
        """Return those of a division; more layers than there are is all of them."""
        first = max(0, everything(n_layers) - division.n_gpu_layers)
        return cls(n_layers, first, max(first, division.n_cpu_moe))

    @property
    def without_experts(self) -> range:
        """The layers on the GPU whose experts stay in RAM."""
        return range(self.first, max(self.first, min(self.experts, self.n_layers)))


@dataclass(frozen=True)
class Sites:
    """What decides where each tensor lies: one entry a tensor.

    layer is n_layers for what comes with the output layer, -1 for what tokens look up.
    """

    n_layers: int
    layer: NDArray[np.int64]
    is_expert: Mask
    is_tied: Mask

    @classmethod
    def of(cls, names: Iterable[str], n_layers: int, *, tied: bool) -> "Sites":
        """Return those of a model's tensors; tied says that its embedding is its head as well."""
        names = tuple(names)

        def layer(name: str) -> int:
            found = layer_of(name)
            if found is not None and found < n_layers:
                return found
            return _INPUT if is_input(name) else n_layers

        return cls(
            n_layers,
            np.array([layer(n) for n in names], np.int64),
            np.array([is_kept_by_cpu_moe(n) for n in names], bool),
            np.array([tied and n == TOKEN_EMBEDDING for n in names], bool),
        )

    def in_vram(self, division: Division) -> Mask:
        """Return which tensors the GPU has, the copy of a tied embedding among them."""
        offloaded = Offloaded.of(division, self.n_layers)
        kept = self.is_expert & (self.layer < offloaded.experts)
        found: Mask = (self.layer >= offloaded.first) & ~kept
        return found | (self.is_tied & (division.n_gpu_layers > 0))

    def in_ram(self, division: Division) -> Mask:
        """Return which tensors RAM has; what is looked up always."""
        found: Mask = ~self.in_vram(division) | (self.layer == _INPUT)
        return found

    def on_cpu(self, division: Division) -> Mask:
        """Return which tensors the CPU multiplies: those in RAM that are not only looked up."""
        looked_up = (self.layer == _INPUT) & ~(self.is_tied & (division.n_gpu_layers == 0))
        found: Mask = self.in_ram(division) & ~looked_up
        return found
