"""A loaded copy of the model whose tensors are what formats would leave of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import PlanError
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.quants.imatrix import Imatrix
from ramgguf.quants.roundtrip import SOURCES, simulated

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PatchedWeights:
    """The copy's tensors, written as formats would leave them."""

    file: GGUFFile
    probe: PatchedModel
    encoder: str
    imatrix: Imatrix | None
    threads: int

    def put(self, name: str, format_name: str) -> float:
        """Make the tensor what the format leaves of it, and return its NMSE.

        Its own format makes it the original again.
        """
        tensor = self.file.tensor(name)
        if format_name == tensor.type_name:
            self.probe.put(tensor, None)
            return 0.0
        if tensor.type_name not in SOURCES:
            raise PlanError(
                f"{name} is {tensor.type_name}; refinement needs a model in F32, F16 or BF16"
            )
        _, nmse = simulated(
            self.file,
            tensor,
            format_name,
            encoder=self.encoder,
            imatrix=self.imatrix,
            threads=self.threads,
            store_as=self.probe.stored_as(name),
            out=self.probe.rows(tensor),
        )
        return nmse
