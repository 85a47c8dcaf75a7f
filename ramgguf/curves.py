"""The frontier as a value: every step of a model's size–cost curve, and its file."""

from typing import Annotated, ClassVar

from pydantic import Field

from ramgguf.predictions import Prediction
from ramgguf.schema import (
    Constraints,
    Document,
    Encoder,
    ImportanceSource,
    NonNegative,
    Positive,
    Source,
    _Value,
)

NonNegativeFloat = Annotated[float, Field(ge=0)]


class FrontierTensor(_Value):
    """What a plan repeats of a tensor; note says why there is no choice.

    relative_error is that of its sensitivity, if that is the objective.
    """

    name: str
    role: str
    source_format: str
    n_weights: Positive
    note: str | None = None
    relative_error: NonNegativeFloat | None = None


class FrontierChoice(_Value):
    """A vertex of a group's convex hull: bytes in the file and cost, and each member's share."""

    format: str
    n_bytes: Positive
    cost: NonNegativeFloat
    tensor_bytes: tuple[Positive, ...]
    tensor_nmse: tuple[NonNegativeFloat, ...]
    tensor_cost: tuple[NonNegativeFloat, ...]


class FrontierGroup(_Value):
    """Tensors that take one format together, by index, and their hull by ascending bytes."""

    members: tuple[NonNegative, ...]
    choices: tuple[FrontierChoice, ...]


class FrontierStep(_Value):
    """One group's step up to choice; n_bytes and cost are the whole plan's after it.

    price is what a byte of the step buys; it falls from step to step.
    """

    group: NonNegative
    choice: Positive
    n_bytes: Positive
    cost: NonNegativeFloat
    price: NonNegativeFloat


class Frontier(Document):
    """The plans of least cost for all sizes, start to end; each step's plan is optimal.

    end_price is what a byte of the first step beyond the end would buy, 0 if there is none.
    knees are indices of steps after which a byte buys clearly less than before. predictions are
    of the start and of each step; none are made for objectives that were never calibrated.
    """

    KIND: ClassVar[str] = "frontier"

    ramgguf_version: str
    source: Source
    encoder: Encoder
    imatrix: ImportanceSource | None = None
    objective: str
    sensitivity_sha256: str | None = None
    constraints: Constraints
    n_overhead_bytes: NonNegative
    tensors: tuple[FrontierTensor, ...]
    groups: tuple[FrontierGroup, ...]
    start_bytes: Positive
    start_cost: NonNegativeFloat
    steps: tuple[FrontierStep, ...]
    end_price: NonNegativeFloat
    knees: tuple[NonNegative, ...]
    predictions: tuple[Prediction, ...] = ()
    predicted_from: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def end_bytes(self) -> int:
        return self.steps[-1].n_bytes if self.steps else self.start_bytes

    def bpw(self, n_bytes: int) -> float:
        """Bits per weight of the tensors' data in a file of so many bytes."""
        return 8 * (n_bytes - self.n_overhead_bytes) / self.n_weights
