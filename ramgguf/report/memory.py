"""Where the memory goes, for the terminal."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from ramgguf.core.units import format_bytes
from ramgguf.plan.result import Division, MemoryBudget, MemoryUse
from ramgguf.report.grid import Field, Grid, grid_of, to_rich

# llama.cpp's options for what runs beside a model, and those that keep it in RAM.
_BESIDE = {"mmproj": "--mmproj", "draft": "-md"}
_IN_RAM = {"mmproj": "--no-mmproj-offload", "draft": "-ngld 0"}


@dataclass(frozen=True)
class _Device:
    """What is used of RAM or of the GPU's memory, and its limit."""

    name: str
    use: MemoryUse
    limit: int | None

    @property
    def margin(self) -> int | None:
        return None if self.limit is None else self.limit - self.use.total


def memory_grid(memory: MemoryBudget) -> Grid:
    """Return the breakdown of RAM and the GPU: weights, cache, compute, overhead and margin."""

    def size(n_bytes: Callable[[_Device], int | None]) -> Callable[[_Device], str]:
        return lambda d: "–" if (n := n_bytes(d)) is None else format_bytes(n)

    fields: list[Field[_Device]] = [
        Field("memory", lambda d: d.name, number=False),
        Field("weights", size(lambda d: d.use.weights)),
        Field("cache", size(lambda d: d.use.cache)),
        Field("compute", size(lambda d: d.use.compute)),
        Field("overhead", size(lambda d: d.use.overhead)),
        Field("sum", size(lambda d: d.use.total)),
        Field("limit", size(lambda d: d.limit)),
        Field("margin", size(lambda d: d.margin)),
    ]
    devices = [_Device("RAM", memory.ram, memory.limit)]
    if memory.vram is not None:
        devices.append(_Device("GPU", memory.vram, memory.vram_limit))
    return grid_of("", fields, devices)


def context(memory: MemoryBudget) -> str:
    """Return what the memory is for, and who limits it."""
    sequences = f" for each of {memory.n_seq} sequences" if memory.n_seq > 1 else ""
    return (
        f"context {memory.n_ctx} tokens{sequences}, cache in {memory.type_k}/{memory.type_v}; "
        f"limit: {memory.limit_source}"
    )


def print_memory(memory: MemoryBudget, division: Division | None, console: Console) -> None:
    """Print the breakdown: weights, cache, compute, overhead and margin of RAM and the GPU."""
    console.print(to_rich(memory_grid(memory), header_style="bold"))
    console.print(context(memory), soft_wrap=True)
    for line in remarks(memory, division):
        console.print(f"note: {line}", soft_wrap=True)


def context_options(n_ctx: int, n_seq: int, type_k: str, type_v: str) -> str:
    """Return llama.cpp's options for n_seq sequences of n_ctx tokens, and for the cache's types."""
    flags = f"-c {n_ctx * n_seq}"
    flags += f" -np {n_seq}" if n_seq > 1 else ""
    for option, name in (("-ctk", type_k), ("-ctv", type_v)):
        flags += f" {option} {name.lower()}" if name != "F16" else ""
    return flags


def remarks(memory: MemoryBudget, division: Division | None) -> list[str]:
    """Return how the sizes are known, and which options llama.cpp runs it with.

    division is the plan's; plans of earlier versions have none.
    """
    flags = context_options(memory.n_ctx, memory.n_seq, memory.type_k, memory.type_v)
    if division is None and memory.n_gpu_layers is not None:
        division = Division(n_gpu_layers=memory.n_gpu_layers)
    flags += f" {division.options}" if division is not None else ""
    for other in memory.beside:
        flags += f" {_BESIDE[other.kind]} {shlex.quote(other.path)}"
        if memory.n_gpu_layers:
            flags += f" {_IN_RAM[other.kind]}"
    lines = [f"run it with llama.cpp's options {flags}"]
    if memory.method == "llama.cpp":
        lines.append("weights, cache and compute are llama.cpp's own figures, overhead an estimate")
    else:
        lines.append(f"an estimate from the header, not llama.cpp's figures: {memory.why_estimate}")
    for other in memory.beside:
        parts = [f"weights {format_bytes(other.weights)}"]
        parts += [f"cache {format_bytes(other.cache)}"] * bool(other.cache)
        parts += [f"compute {format_bytes(other.compute)}"] * bool(other.compute)
        lines.append(
            f"the overhead includes {other.path}: {', '.join(parts)}"
            + ("; its compute buffers are not known" if other.kind == "mmproj" else "")
        )
    if memory.vram is not None:
        lines.append("the GPU's part is an estimate, not measured on a GPU")
    return lines
