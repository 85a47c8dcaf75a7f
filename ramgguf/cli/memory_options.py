"""Options that say in how much memory a model shall run, and with what context."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ramgguf.cli.options import refuse_idle, split_formats
from ramgguf.core.errors import BudgetError
from ramgguf.core.machine import available_memory
from ramgguf.core.units import parse_size
from ramgguf.deploy import MemoryLimit, MemoryRequest
from ramgguf.deploy.beside import BesideModel
from ramgguf.deploy.division_rooms import CPU_FORMATS
from ramgguf.deploy.footprint import parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.plan import ByteLimit, SizeLimit
from ramgguf.quants import formats

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="RAM that weights, cache, compute buffers and overhead must fit: 16GB, 16GiB.",
    ),
]
RunsIn = Annotated[
    str | None,
    typer.Option("--memory", help="What it must run in: 16GB; default: what is left here."),
]
Fit = Annotated[
    bool,
    typer.Option("--fit", help="As --memory, with what this machine or its cgroup has left."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", min=1, help="Tokens of context of each sequence, with --memory."),
]
CacheType = Annotated[
    str, typer.Option("--cache-type", help="Of keys and values: f16, q8_0, or two: q8_0,f16.")
]
OptionalCacheType = Annotated[
    str | None,
    typer.Option("--cache-type", help="Of keys and values: f16 (default), q8_0, or two: q8_0,f16."),
]
Parallel = Annotated[
    int, typer.Option("--parallel", min=1, help="Sequences at a time, each with its context.")
]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram",
        help="Memory of a GPU: which layers or experts go there is planned with their formats; "
        "without --memory all go (not measured on a GPU).",
    ),
]
Ngl = Annotated[
    int | None,
    typer.Option("--ngl", min=0, help="Layers on the GPU, as llama.cpp's --n-gpu-layers."),
]
CpuFormats = Annotated[
    str | None,
    typer.Option(
        "--cpu-formats",
        help="With --vram or --ngl: formats, or sets of them, of what stays on the CPU; all: any. "
        "Default: cpu-fast.",
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option("--mmproj", help="A vision projector that runs beside the model, with --memory."),
]
QuantizeMmproj = Annotated[
    bool,
    typer.Option(
        "--quantize-mmproj",
        help="Quantize the projector of --mmproj, too: its formats are planned together with the "
        "model's, within --memory.",
    ),
]
MmprojOutput = Annotated[
    Path | None,
    typer.Option(
        "--mmproj-output",
        help="The same, and where to write it. Default: beside the projector, named after its "
        "bits per weight.",
    ),
]
MmprojMeasurement = Annotated[
    Path | None,
    typer.Option(
        "--mmproj-measurement",
        help="What measure wrote of the projector of --mmproj: its formats are planned as well.",
    ),
]
Draft = Annotated[
    Path | None,
    typer.Option(
        "--draft", help="A draft model that runs beside it: weights, cache and buffers count."
    ),
]

SourceModel = Annotated[
    Path | None,
    typer.Option("--model", help="The model measured, with --memory; default: where it was."),
]


@dataclass(frozen=True)
class MemoryOptions:
    """What shall run, and in how much memory."""

    memory: Memory = None
    fit: Fit = False
    context: Context = None
    cache_type: OptionalCacheType = None
    parallel: Parallel = 1
    vram: Vram = None
    ngl: Ngl = None
    mmproj: Mmproj = None
    draft: Draft = None
    cpu_formats: CpuFormats = None

    def request(self) -> MemoryRequest | None:
        """Return what the options ask for, None if they do not; raises usage errors."""
        if self.memory is not None and self.fit:
            raise typer.BadParameter("give either --memory or --fit", param_hint="--fit")
        if self.memory is None and not self.fit and self.vram is None:
            given = {
                "--context": self.context is not None,
                "--cache-type": self.cache_type is not None,
                "--parallel": self.parallel != 1,
                "--ngl": self.ngl is not None,
                "--mmproj": self.mmproj is not None,
                "--draft": self.draft is not None,
                "--cpu-formats": self.cpu_formats is not None,
            }
            idle = [name for name, is_given in given.items() if is_given]
            refuse_idle(idle, "only with --memory, --fit or --vram")
            return None
        if self.vram is None and self.ngl is None and self.cpu_formats is not None:
            refuse_idle(["--cpu-formats"], "only with --vram or --ngl")
        if self.context is None:
            raise typer.BadParameter(
                "say how many tokens of context shall fit, such as 4096", param_hint="--context"
            )
        ram, source = None, "not limited"
        if self.memory is not None:
            ram, source = parse_size(self.memory), "--memory"
        if self.fit:
            available = available_memory()
            ram, source = available.n_bytes, available.source
            if ram == 0:
                raise BudgetError(f"{source} leaves no memory")
        return MemoryRequest(
            ContextShape(self.context, self.parallel, *parse_cache_types(self.cache_type or "f16")),
            ram=ram,
            source=source,
            vram=None if self.vram is None else parse_size(self.vram),
            n_gpu_layers=self.ngl,
            beside=BesideModel(self.mmproj, self.draft),
            cpu_formats=_cpu_formats(self.cpu_formats),
        )


def _cpu_formats(text: str | None) -> tuple[str, ...] | None:
    """Return the formats of the CPU's side that the option names, None for all of them."""
    if text is None:
        return CPU_FORMATS
    if text.strip().lower() == "all":
        return None
    names = tuple(split_formats(text) or ())
    for name in names:
        formats.get(name)  # raises FormatError for what is none
    if not names:
        raise typer.BadParameter("name formats, or all", param_hint="--cpu-formats")
    return names


def size_limit(
    budget: str | None, request: MemoryRequest | None, model: Path | None = None
) -> SizeLimit:
    """Return the limit that a budget, memory or both set; one of them is given.

    model is the one measured, by default where it was.
    """
    if request is not None:
        return MemoryLimit(request, budget, model)
    assert budget is not None
    return ByteLimit(budget)
