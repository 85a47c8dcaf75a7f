"""A loaded copy of the model with a plan's weights in it, and the KLD of some tokens under them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.engine.probe import Probe
from ramgguf.engine.wire import TokenIds
from ramgguf.errors import PlanError
from ramgguf.gguf_io import GGUFFile
from ramgguf.imatrix import Imatrix
from ramgguf.refinements import KLDChange
from ramgguf.simulation import SOURCES, simulated
from ramgguf.token_statistics import standard_error

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PlannedWeights:
    """The copy's tensors, written as formats would leave them."""

    file: GGUFFile
    probe: Probe
    encoder: str
    imatrix: Imatrix | None
    threads: int

    def put(self, name: str, format_name: str) -> None:
        """Make the tensor what the format leaves of it; its own format, the original."""
        tensor = self.file.tensor(name)
        if format_name == tensor.type_name:
            self.probe.put(tensor, None)
            return
        if tensor.type_name not in SOURCES:
            raise PlanError(
                f"{name} is {tensor.type_name}; refinement needs a model in F32, F16 or BF16"
            )
        data, _ = simulated(
            self.file,
            tensor,
            format_name,
            encoder=self.encoder,
            imatrix=self.imatrix,
            threads=self.threads,
        )
        self.probe.put(tensor, data)


class TokenSet:
    """One set of sequences: the original's logits, and the KLD of each token as the plan stands."""

    def __init__(self, sequences: Sequence[TokenIds], probe: Probe) -> None:
        self._sequences, self._probe = sequences, probe
        self._reference = [probe.logits(ids) for ids in sequences]
        self.before: Floats | None = None
        self.now: Floats | None = None

    def divergence(self) -> Floats:
        """Return the KLD of every token with the weights that the copy has."""
        pairs = zip(self._sequences, self._reference, strict=True)
        return np.concatenate([self._probe.divergence(ids, logits) for ids, logits in pairs])

    def current(self) -> Floats:
        """Return the KLD of every token as the plan stands, which is what the copy must have."""
        if self.now is None:
            self.now = self.divergence()
        if self.before is None:
            self.before = self.now
        return self.now

    def told(self) -> KLDChange:
        """Return the KLD as the plan was and as it stands."""
        now = self.current()
        before = now if self.before is None else self.before
        return KLDChange(
            n_tokens=len(now),
            sha256=hashlib.sha256(b"".join(ids.tobytes() for ids in self._sequences)).hexdigest(),
            before=max(0.0, float(before.mean())),
            after=max(0.0, float(now.mean())),
            error=standard_error(now - before),
        )
