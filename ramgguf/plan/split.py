"""Where the tensors of a model lie, in RAM or in a GPU's memory, by llama.cpp's options.

src/llama-model.cpp counts the layers and, after them, the output layer: the last n_gpu_layers are
offloaded. What tokens only look up stays in RAM; a tied embedding is then kept a second time, as
the output layer. --n-cpu-moe N (common/arg.cpp) keeps the experts of the first N layers in RAM.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.gguf.architecture import TOKEN_EMBEDDING, is_input, is_kept_by_cpu_moe, layer_of
from ramgguf.plan.result import Split

_INPUT = -1

Mask = NDArray[np.bool_]


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

    def in_vram(self, split: Split) -> Mask:
        """Return which tensors the GPU has, the copy of a tied embedding among them."""
        first = self.n_layers + 1 - min(split.n_gpu_layers, self.n_layers + 1)
        kept = self.is_expert & (self.layer < split.n_cpu_moe)
        found: Mask = (self.layer >= first) & ~kept
        return found | (self.is_tied & (split.n_gpu_layers > 0))

    def in_ram(self, split: Split) -> Mask:
        """Return which tensors RAM has; what is looked up always."""
        found: Mask = ~self.in_vram(split) | (self.layer == _INPUT)
        return found

    def on_cpu(self, split: Split) -> Mask:
        """Return which tensors the CPU multiplies: those in RAM that are not only looked up."""
        looked_up = (self.layer == _INPUT) & ~(self.is_tied & (split.n_gpu_layers == 0))
        found: Mask = self.in_ram(split) & ~looked_up
        return found
