"""The values that pass between stages, and their files: JSON with a schema name and version."""

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from ramgguf.documents import Document as Document
from ramgguf.documents import NonNegative as NonNegative
from ramgguf.documents import NonNegativeFloat as NonNegativeFloat
from ramgguf.documents import Number as Number
from ramgguf.documents import Positive as Positive
from ramgguf.documents import _Value as _Value
from ramgguf.errors import PlanError
from ramgguf.hub import HubFile
from ramgguf.refinements import Refinement

Encoder = Literal["rtn", "search", "gptq"]


class Source(_Value):
    """Which model a value was made from; header_sha256 and n_bytes tell models apart quickly.

    hub is which file of the hub it is, where it lies in the hub's cache.
    """

    path: str
    n_bytes: Positive
    header_sha256: str
    data_sha256: str | None = None
    architecture: str
    name: str | None = None
    hub: HubFile | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a tensor's rate–distortion curve: its bytes and loss in a format.

    nmse_error is the standard error of an NMSE that was measured on a sample of the rows. Where
    nmse is weighed by importance, plain_nmse is that of the weights by themselves. A model may
    have hundreds of thousands of points: they are small, and checked when they come from a file.
    """

    __pydantic_config__ = _Value.model_config

    format: str
    n_bytes: Positive
    nmse: NonNegativeFloat
    max_error: NonNegativeFloat
    nmse_error: NonNegativeFloat = 0.0
    plain_nmse: NonNegativeFloat | None = None

    @property
    def unweighed(self) -> float:
        """The NMSE of the weights by themselves, where it is known."""
        return self.nmse if self.plain_nmse is None else self.plain_nmse

    @property
    def sqnr_db(self) -> float:
        """SQNR = −10 log10(NMSE) in dB; infinite for a lossless format."""
        return -10 * math.log10(self.nmse) if self.nmse > 0 else math.inf


class TensorMeasurement(_Value):
    """What is known of one tensor: its statistics and its rate–distortion curve.

    shape is in ggml's order (row length first). points lists the candidates by ascending bytes,
    the source's own format included; excluded says why a format of the pass is no candidate.
    kept says why the tensor is not quantized at all (then points holds the source format only).
    output_squares is Σ wx² with the importance w of its columns: the mean squared output, were
    inputs uncorrelated; None without importance.
    """

    name: str
    shape: tuple[Positive, ...]
    role: str
    layer: NonNegative | None
    source_format: str
    n_bytes: Positive
    sum_squares: NonNegativeFloat
    output_squares: NonNegativeFloat | None = None
    max_abs: NonNegativeFloat
    excess_kurtosis: Number
    points: tuple[Point, ...]
    excluded: dict[str, str] = Field(default_factory=dict)
    kept: str | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        return self.shape[0]


class ImportanceSource(_Value):
    """Which importance matrix weighed the errors; n_entries and n_chunks are as the file says.

    With a file of Hessians, errors are those of the outputs where it has an entry.
    """

    path: str
    sha256: str
    dataset: str | None = None
    n_entries: Positive
    n_chunks: NonNegative | None = None
    hessian_path: str | None = None
    hessian_sha256: str | None = None

    @property
    def identity(self) -> str:
        """What tells errors that were weighed in one way from those weighed in another."""
        return f"{self.sha256} {self.hessian_sha256}" if self.hessian_sha256 else self.sha256


class Measurement(Document):
    """The rate–distortion curves of a whole model.

    With an importance matrix, NMSE is Σ w(x−q)² / Σ w x² for the tensors that it has entries for.
    """

    KIND: ClassVar[str] = "measurement"

    ramgguf_version: str
    source: Source
    encoder: Encoder
    imatrix: ImportanceSource | None = None
    formats: tuple[str, ...]
    n_overhead_bytes: NonNegative
    alignment: Positive
    n_layers: NonNegative | None
    tensors: Annotated[tuple[TensorMeasurement, ...], Field(min_length=1)]
    seconds: Number = 0.0

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)


class Pin(_Value):
    """Tensors whose name the pattern matches (re.search) must take this format."""

    pattern: str
    format: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the pin that 'regex=FORMAT' stands for; raises PlanError otherwise."""
        pattern, equals, name = text.rpartition("=")
        if not (equals and pattern and name):
            raise PlanError(f"pin {text!r} is not of the form 'regex=FORMAT'")
        try:
            re.compile(pattern)
        except re.error as e:
            raise PlanError(f"pin {text!r}: {pattern!r} is not a regular expression: {e}") from None
        return cls(pattern=pattern, format=name.upper())


class MinFormat(_Value):
    """Tensors of the role must take no fewer bits per weight than this format has."""

    role: str
    format: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return what 'role=FORMAT' stands for; raises PlanError otherwise."""
        role, equals, name = text.partition("=")
        if not (equals and role and name):
            raise PlanError(f"minimum format {text!r} is not of the form 'role=FORMAT'")
        return cls(role=role, format=name.upper())


class Constraints(_Value):
    """What a plan must respect.

    formats None allows every measured one; each tie lists the roles whose tensors of one layer
    take the same format.
    """

    min_sqnr_db: Number = 9.0
    formats: tuple[str, ...] | None = None
    pins: tuple[Pin, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    min_formats: tuple[MinFormat, ...] = ()


class Assignment(_Value):
    """What the plan gives one tensor; nmse is the measured one, cost its share of the objective."""

    name: str
    role: str
    source_format: str
    format: str
    n_weights: Positive
    n_bytes: Positive
    nmse: NonNegativeFloat
    cost: NonNegativeFloat
    note: str | None = None


class NextPercent(_Value):
    """What one percent more budget would buy: the cost then, and how many formats change."""

    n_bytes: Positive
    total_cost: NonNegativeFloat
    n_changes: NonNegative


class MemoryUse(_Value):
    """Bytes by purpose; cache is keys, values and recurrent state."""

    weights: NonNegative = 0
    cache: NonNegative = 0
    compute: NonNegative = 0
    overhead: NonNegative = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.overhead


class MemoryBudget(_Value):
    """How a plan's budget follows from memory, for n_seq sequences of n_ctx tokens each."""

    limit: Positive | None
    limit_source: str
    n_ctx: Positive
    n_seq: Positive
    type_k: str
    type_v: str
    method: Literal["llama.cpp", "estimate"]
    why_estimate: str | None = None
    ram: MemoryUse
    n_gpu_layers: NonNegative | None = None
    vram_limit: Positive | None = None
    vram: MemoryUse | None = None


class Plan(Document):
    """A format for every tensor, with what it costs, what it loses and how near the optimum it is.

    n_bytes is the whole output file; gap is the proven relative optimality gap of the objective.
    Under the objective sensitivity, total_cost is the predicted KLD in nats per token, with its
    standard error; sensitivity_sha256 names the sensitivities.
    """

    KIND: ClassVar[str] = "plan"

    ramgguf_version: str
    source: Source
    encoder: Encoder
    imatrix: ImportanceSource | None = None
    objective: str
    budget: Positive
    n_bytes: Positive
    n_overhead_bytes: NonNegative
    total_cost: NonNegativeFloat
    total_cost_error: NonNegativeFloat | None = None
    sensitivity_sha256: str | None = None
    gap: NonNegativeFloat
    constraints: Constraints = Constraints()
    assignments: Annotated[tuple[Assignment, ...], Field(min_length=1)]
    next_percent: NextPercent | None = None
    refinement: Refinement | None = None
    memory: MemoryBudget | None = None
    notes: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        return sum(a.n_weights for a in self.assignments)

    @property
    def bpw(self) -> float:
        """Bits per weight of the tensors' data."""
        return 8 * sum(a.n_bytes for a in self.assignments) / self.n_weights

    def sha256(self) -> str:
        """Return the hash of what decides the output's bytes: encoder and tensor–format pairs."""
        encoder = f"{self.encoder} {self.imatrix.identity}" if self.imatrix else self.encoder
        text = "\n".join([encoder, *(f"{a.name}={a.format}" for a in self.assignments)])
        return hashlib.sha256(text.encode()).hexdigest()
