"""What a request leaves for weights in RAM and on a GPU, for every way to divide a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ramgguf.deploy.beside import BesideModel
from ramgguf.deploy.footprint import Footprint
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.offload import place
from ramgguf.gguf.layout import encoded_bytes, padded
from ramgguf.gguf.reader import GGUFFile
from ramgguf.plan import DivisionRoom, Pools, Sites, divisions, everything
from ramgguf.plan.result import Division
from ramgguf.quants.formats import expand

CPU_FORMATS = ("cpu-fast",)  # of what a GPU leaves to the CPU


@dataclass(frozen=True)
class MemoryRequest:
    """What shall run, and in how much memory.

    ram None is no limit; source says where its figure is from; beside is what else runs there. With
    vram or n_gpu_layers, layers go to a GPU: all without a limit of RAM, n_gpu_layers where given,
    else those with which formats lose least. cpu_formats are formats, or sets of them, for what the
    CPU then multiplies; None allows it all.
    """

    shape: ContextShape
    ram: int | None
    source: str = "--memory"
    vram: int | None = None
    n_gpu_layers: int | None = None
    beside: BesideModel = field(default_factory=BesideModel)
    cpu_formats: tuple[str, ...] | None = CPU_FORMATS

    @property
    def offloads(self) -> bool:
        """Whether a part may go to a GPU."""
        return self.vram is not None or self.n_gpu_layers is not None


class DivisionRooms:
    """The divisions that a request allows, and what each leaves."""

    def __init__(self, file: GGUFFile, request: MemoryRequest) -> None:
        self._file, self._request = file, request
        self._sites = Sites.of(
            (t.name for t in file.tensors), file.n_layers or 0, tied=file.has_tied_embedding
        )

    def divisions(self, footprint: Footprint) -> list[Division]:
        """Return the divisions that the request allows, the most on the GPU first."""
        request = self._request
        found = list(divisions(footprint.n_layers, footprint.expert_layers))
        if not request.offloads:
            return found[-1:]
        if request.n_gpu_layers is not None:
            n = min(request.n_gpu_layers, everything(footprint.n_layers))
            found = [s for s in found if s.n_gpu_layers == n]
        return found[:1] if request.ram is None else found

    def of(
        self, footprint: Footprint, tensor_types: Mapping[str, str], share: float = 1.0
    ) -> list[DivisionRoom]:
        """Return what each division leaves: what a footprint has besides its tensors is taken.

        The footprint is of these types, or scaled by a share.
        """
        request, rooms, sizes = self._request, [], share * self._sizes(tensor_types)
        for division in self.divisions(footprint):
            placed = place(footprint, division)
            in_ram, in_vram = self._sites.in_ram(division), self._sites.in_vram(division)
            left = [
                None if limit is None else limit - use.total + int(sizes[mask].sum())
                for limit, use, mask in (
                    (request.ram, placed.ram, in_ram),
                    (request.vram, placed.vram, in_vram),
                )
            ]
            rooms.append(DivisionRoom(division, *left))
        return rooms

    def _sizes(self, tensor_types: Mapping[str, str]) -> NDArray[np.float64]:
        """Return every tensor's bytes in these types, the source's own for others."""
        return np.array(
            [
                padded(
                    encoded_bytes(t, tensor_types.get(t.name, t.type_name)), self._file.alignment
                )
                for t in self._file.tensors
            ],
            np.float64,
        )

    def pools(self, rooms: Sequence[DivisionRoom], *, any_format: bool = False) -> Pools:
        """Return the pools of a plan; with any_format, the CPU's side has no formats of its own."""
        names = None if any_format else self._request.cpu_formats
        formats = None if names is None else expand(names)
        return Pools(tuple(rooms), self._sites.n_layers, self._file.has_tied_embedding, formats)


def smaller_rooms(a: Sequence[DivisionRoom], b: Sequence[DivisionRoom]) -> list[DivisionRoom]:
    """Return what both leave of each memory."""

    def less(x: int | None, y: int | None) -> int | None:
        return x if y is None else y if x is None else min(x, y)

    return [
        DivisionRoom(one.division, less(one.ram, other.ram), less(one.vram, other.vram))
        for one, other in zip(a, b, strict=True)
    ]
