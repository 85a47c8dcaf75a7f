"""The frontier as a value: every step of a model's size–cost curve, and its file."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from ramgguf.core.documents import Document, FrozenModel, NonNegative, NonNegativeFloat, Positive
from ramgguf.gguf.identity import Source
from ramgguf.plan.result import Constraints
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource


class FrontierTensor(FrozenModel):
    """What a plan repeats of a tensor; note says why there is no choice.

    grid is the format on whose grid the weights lie, if there is one.

    alpha is its sensitivity, if plans go by these, relative_error that of α, and late the share of
    it on tokens that scores count.
    """

    name: str
    role: str
    source_format: str
    n_weights: Positive
    grid: str | None = None
    note: str | None = None
    alpha: NonNegativeFloat | None = None
    relative_error: NonNegativeFloat | None = None
    late: NonNegativeFloat | None = None


class FrontierChoice(FrozenModel):
    """A vertex of a group's convex hull: bytes in the file and cost, and each member's share."""

    format: str
    n_bytes: Positive
    cost: NonNegativeFloat
    tensor_bytes: tuple[Positive, ...]
    tensor_nmse: tuple[NonNegativeFloat, ...]
    tensor_cost: tuple[NonNegativeFloat, ...]


class FrontierGroup(FrozenModel):
    """Tensors that take one format together, by index, and their hull by ascending bytes."""

    members: tuple[NonNegative, ...]
    choices: Annotated[tuple[FrontierChoice, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        for c in self.choices:
            if {len(c.tensor_bytes), len(c.tensor_nmse), len(c.tensor_cost)} != {len(self.members)}:
                raise ValueError(f"{c.format} has not one value for each member")
        return self


class FrontierStep(FrozenModel):
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
    knees are indices of steps after which a byte buys clearly less than before.
    """

    KIND: ClassVar[str] = "frontier"
    VERSION: ClassVar[int] = 2  # 2: source.sample_sha256

    ramgguf_version: str
    source: Source
    encoder: EncoderName
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
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_predictions(cls, data: Any) -> Any:
        """Drop what older files promised from one network's figures."""
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if k not in ("predictions", "predicted_from")}
        return data

    @model_validator(mode="after")
    def _check_structure(self) -> Self:
        members = [m for group in self.groups for m in group.members]
        if not members or sorted(members) != list(range(len(self.tensors))):
            raise ValueError("each tensor must be in one group")
        n_bytes = self.start_bytes
        for step in self.steps:
            group = self.groups[step.group] if step.group < len(self.groups) else None
            if group is None or not 0 < step.choice < len(group.choices):
                raise ValueError(f"there is no step to {step.n_bytes} bytes")
            before, after = group.choices[step.choice - 1], group.choices[step.choice]
            if n_bytes + after.n_bytes - before.n_bytes != step.n_bytes:
                raise ValueError(f"a step to {step.n_bytes} bytes does not follow {n_bytes}")
            n_bytes = step.n_bytes
        if self.knees and max(self.knees) >= len(self.steps):
            raise ValueError("a knee is at no step")
        return self

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)

    @property
    def end_bytes(self) -> int:
        return self.steps[-1].n_bytes if self.steps else self.start_bytes

    def bpw(self, n_bytes: int) -> float:
        """Bits per weight of the tensors' data in a file of so many bytes."""
        return 8 * (n_bytes - self.n_overhead_bytes) / self.n_weights


def ends_before(frontier: Frontier, budget: int) -> bool:
    """Return whether the budget has room for steps beyond the frontier's end."""
    return budget > frontier.end_bytes and frontier.end_price > 0
