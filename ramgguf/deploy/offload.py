"""What a division of the model takes of RAM and of a GPU's memory.

Which layers and experts lie where is ramgguf.plan.division's; a layer's cache is where the layer
is. Not measured on a GPU; tests compare the sums with what llama.cpp plans for a stand-in.
"""

from dataclasses import dataclass

from ramgguf.deploy.footprint import Footprint
from ramgguf.deploy.footprint_formula import N_UBATCH
from ramgguf.plan import Offloaded, everything
from ramgguf.plan.result import Division, MemoryUse

# An allowance for what the driver and its libraries take for themselves.
_GPU_OVERHEAD = 500_000_000


@dataclass(frozen=True)
class Placed:
    """A model divided between RAM and a GPU's memory."""

    division: Division
    ram: MemoryUse
    vram: MemoryUse


def place(footprint: Footprint, division: Division) -> Placed:
    """Return where everything goes.

    Tied embeddings count twice when the output layer is offloaded. The graph's memory is counted
    on both devices while both compute, and what they hand over twice more; the GPU then also takes
    a copy of one of RAM's tensors, for it multiplies with them in long prompts. RAM keeps the
    embeddings of a batch and its mask with everything offloaded.
    """
    n = min(division.n_gpu_layers, everything(footprint.n_layers))
    if n == 0:
        return Placed(Division(n_gpu_layers=0), footprint.use, MemoryUse())
    offloaded = Offloaded.of(division, footprint.n_layers)
    first, kept = offloaded.first, offloaded.without_experts
    experts = sum(footprint.layer_experts[i] for i in kept)
    copied = [i for i in kept if footprint.layer_experts[i]]
    copied += range(first) if footprint.layer_largest else ()
    vram = MemoryUse(
        weights=sum(footprint.layer_weights[first:])
        - experts
        + footprint.output_weights
        + footprint.output_copy,
        cache=sum(footprint.layer_cache[first:]),
        compute=footprint.compute
        + 2 * footprint.hidden
        + max((footprint.layer_largest[i] for i in copied), default=0),
        overhead=_GPU_OVERHEAD,
    )
    computes = first > 0 or experts > 0
    shape = footprint.shape
    inputs = 3 * footprint.hidden + 2 * N_UBATCH * shape.n_ctx * shape.n_seq
    ram = MemoryUse(
        weights=sum(footprint.layer_weights[:first]) + footprint.input_weights + experts,
        cache=sum(footprint.layer_cache[:first]),
        compute=footprint.compute + 2 * footprint.hidden if computes else inputs,
        overhead=footprint.overhead,
    )
    return Placed(division.model_copy(update={"n_gpu_layers": n}), ram, vram)
