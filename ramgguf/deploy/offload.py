"""Which layers go to a GPU: llama.cpp's --n-gpu-layers, by bytes. Not measured on a GPU.

As src/llama-model.cpp places them: of the layers and, after them, the output layer, the last
n_gpu_layers are offloaded, each with its cache; the embedding's rows are looked up by the CPU.
"""

from dataclasses import dataclass

from ramgguf.deploy.footprint import Footprint
from ramgguf.deploy.footprint_formula import N_UBATCH
from ramgguf.plan.result import MemoryUse

# An allowance for what the driver and its libraries take for themselves.
_GPU_OVERHEAD = 500_000_000


@dataclass(frozen=True)
class Placed:
    """A model divided between RAM and a GPU's memory."""

    n_gpu_layers: int
    ram: MemoryUse
    vram: MemoryUse


def most_layers(footprint: Footprint) -> int:
    """Return the n_gpu_layers that offloads everything: all layers and the output layer."""
    return len(footprint.layer_weights) + 1


def place(footprint: Footprint, n_gpu_layers: int) -> Placed:
    """Return where everything goes with so many layers on the GPU.

    Tied embeddings count twice when the output layer is offloaded. The graph's memory is counted
    on both devices while both have layers.
    """
    n_layers = len(footprint.layer_weights)
    n = min(n_gpu_layers, n_layers + 1)
    if n == 0:
        return Placed(0, footprint.use, MemoryUse())
    first = n_layers + 1 - n
    vram = MemoryUse(
        weights=sum(footprint.layer_weights[first:])
        + footprint.output_weights
        + footprint.output_copy,
        cache=sum(footprint.layer_cache[first:]),
        compute=footprint.compute,
        overhead=_GPU_OVERHEAD,
    )
    mask = 2 * N_UBATCH * footprint.shape.n_ctx
    ram = MemoryUse(
        weights=sum(footprint.layer_weights[:first]) + footprint.input_weights,
        cache=sum(footprint.layer_cache[:first]),
        compute=min(footprint.compute, mask) if first == 0 else footprint.compute,
        overhead=footprint.overhead,
    )
    return Placed(n, ram, vram)


def place_within(footprint: Footprint, vram_limit: int) -> Placed:
    """Return the placement of the most layers whose part for the GPU is at most vram_limit."""
    for n in range(most_layers(footprint), 0, -1):
        placed = place(footprint, n)
        if placed.vram.total <= vram_limit:
            return placed
    return place(footprint, 0)
