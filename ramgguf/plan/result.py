"""A plan: the format of every tensor, what it costs, and how it was found; a value and its file."""

import hashlib
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ramgguf.core.documents import (
    Document,
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Number,
    Positive,
)
from ramgguf.core.errors import PlanError
from ramgguf.gguf.identity import Source
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource

DEFAULT_MIN_SQNR_DB = 9.0


class Pin(FrozenModel):
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


class MinFormat(FrozenModel):
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


class Constraints(FrozenModel):
    """What a plan must respect.

    formats None allows every measured one; each tie lists the roles whose tensors of one layer
    take the same format. target is the program whose ties are among them.
    """

    min_sqnr_db: Number = DEFAULT_MIN_SQNR_DB
    formats: tuple[str, ...] | None = None
    pins: tuple[Pin, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    min_formats: tuple[MinFormat, ...] = ()
    target: str | None = None


class Assignment(FrozenModel):
    """What the plan gives one tensor; nmse is the measured one, cost its share of the objective.

    is_exact: the weights lie on the format's grid, and its blocks are those that hold them exactly.
    """

    name: str
    role: str
    source_format: str
    format: str
    n_weights: Positive
    n_bytes: Positive
    nmse: NonNegativeFloat
    cost: NonNegativeFloat
    note: str | None = None
    is_exact: bool = False


class NextPercent(FrozenModel):
    """What one percent more budget would buy: the cost then, and how many formats change."""

    n_bytes: Positive
    total_cost: NonNegativeFloat
    n_changes: NonNegative


class MemoryUse(FrozenModel):
    """Bytes by purpose; cache is keys, values and recurrent state."""

    weights: NonNegative = 0
    cache: NonNegative = 0
    compute: NonNegative = 0
    overhead: NonNegative = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.overhead


class BesideUse(FrozenModel):
    """Bytes of a file that runs beside the model: a vision projector, or a draft model."""

    kind: Literal["mmproj", "draft"]
    path: str
    weights: NonNegative
    cache: NonNegative = 0
    compute: NonNegative = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute


class MemoryBudget(FrozenModel):
    """How a plan's budget follows from memory, for n_seq sequences of n_ctx tokens each.

    beside are files that run beside the model; RAM's overhead includes them.
    """

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
    beside: tuple[BesideUse, ...] = ()


class Division(FrozenModel):
    """How a model is divided between RAM and a GPU's memory: by llama.cpp's options.

    n_cpu_moe is the number of layers, from the first, whose experts stay in RAM. cpu_formats are
    those that tensors which the CPU multiplies were chosen from; None: any.
    """

    n_gpu_layers: NonNegative
    n_cpu_moe: NonNegative = 0
    cpu_formats: tuple[str, ...] | None = None

    @property
    def options(self) -> str:
        """The options of llama.cpp's programs: -ngl 37 --n-cpu-moe 12.

        With a GPU, -ngl 0 alone would still compute long prompts there.
        """
        if self.n_gpu_layers == 0:
            return "-ngl 0 --device none"
        moe = f" --n-cpu-moe {self.n_cpu_moe}" if self.n_cpu_moe else ""
        return f"-ngl {self.n_gpu_layers}{moe}"


class PlannedSpeed(FrozenModel):
    """Tokens per second that a plan was bound to (0: not), and those that it has.

    generation and prompt are predicted from the speed of formats on this CPU, unless is_measured;
    generation is 0 for an embedding model that was measured.
    """

    least_generation: NonNegativeFloat
    least_prompt: NonNegativeFloat
    generation: NonNegativeFloat
    prompt: NonNegativeFloat
    cpu: str
    n_threads: Positive
    engine: str
    is_measured: bool = False


class PredictedKLD(FrozenModel):
    """The KLD in nats per token that a plan is expected to have, and its 95 % interval."""

    kld: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat


class FormatChange(FrozenModel):
    """A tensor that a refinement gave another format."""

    name: str
    before: str
    after: str


class KLDChange(FrozenModel):
    """Mean KLD in nats per token over some tokens, before and after a refinement.

    error is the standard error of the difference; sha256 is over the tokens' ids.
    """

    n_tokens: Positive
    sha256: str
    before: NonNegativeFloat
    after: NonNegativeFloat
    error: NonNegativeFloat


class Refinement(FrozenModel):
    """How a plan was changed by trials: real KLD, weights decoded to the source's own type.

    Swaps were proposed by the `proposal` tokens, and each was taken because it lowered the KLD over
    `acceptance`; `report` are tokens that decided nothing. cpus names the CPUs that computed.
    """

    tokens: str
    seed: NonNegative
    n_tried: NonNegative
    swaps: tuple[tuple[FormatChange, ...], ...]
    proposal: KLDChange
    acceptance: KLDChange
    report: KLDChange
    cpus: tuple[str, ...] = ()


class QuantizedInputs(FrozenModel):
    """Weights were rounded for the inputs that the quantized layers before theirs put out.

    The tokens that show these are n_sequences of n_ctx.
    """

    tokens: str
    n_sequences: Positive
    n_ctx: Positive

    def __str__(self) -> str:
        return f"{self.tokens} {self.n_sequences}x{self.n_ctx}"


class Plan(Document):
    """A format for every tensor, with what it costs, what it loses and how near the optimum it is.

    n_bytes is the whole output file; gap is the proven relative optimality gap of the objective.
    Under the objective sensitivity, total_cost is Σ α · (NMSE + ρ), with ρ of rounded inputs; under
    posterior each term is the geometric mean of that and of the cost by priors. With either,
    predicted_kld is what the sensitivities make one expect (plan/prediction.py), and
    sensitivity_sha256 names these. imatrix_used tells whether the importance matrix weighs any
    tensor that is encoded; if not, the output does not name it. mmproj is the plan of a vision
    projector that was made together with this one.
    """

    KIND: ClassVar[str] = "plan"
    VERSION: ClassVar[int] = 3  # 2: source.sample_sha256; 3: division, which was split

    ramgguf_version: str
    source: Source
    encoder: EncoderName
    imatrix: ImportanceSource | None = None
    imatrix_used: bool = True
    objective: str
    budget: Positive
    n_bytes: Positive
    n_overhead_bytes: NonNegative
    total_cost: NonNegativeFloat
    predicted_kld: PredictedKLD | None = None
    sensitivity_sha256: str | None = None
    gap: NonNegativeFloat
    constraints: Constraints = Constraints()
    assignments: Annotated[tuple[Assignment, ...], Field(min_length=1)]
    next_percent: NextPercent | None = None
    refinement: Refinement | None = None
    quantized_inputs: QuantizedInputs | None = None
    memory: MemoryBudget | None = None
    division: Division | None = None
    speed: PlannedSpeed | None = None
    mmproj: "Plan | None" = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, data: Any) -> Any:
        """Rename what older files call split; drop their cost's error, that of α's tokens alone."""
        if not isinstance(data, dict):
            return data
        kept = {k: v for k, v in data.items() if k not in ("total_cost_error", "split")}
        if "split" in data:
            kept.setdefault("division", data["split"])
        return kept

    @property
    def n_weights(self) -> int:
        return sum(a.n_weights for a in self.assignments)

    @property
    def encoded(self) -> tuple[bool, ...]:
        """Whether each tensor gets another format than it has in the source."""
        return tuple(a.format != a.source_format for a in self.assignments)

    @property
    def bpw(self) -> float:
        """Bits per weight of the tensors' data."""
        return 8 * sum(a.n_bytes for a in self.assignments) / self.n_weights

    def sha256(self) -> str:
        """Return the hash of what decides the output's bytes: encoder and tensor–format pairs."""
        encoder = f"{self.encoder} {self.imatrix.encoding}" if self.imatrix else self.encoder
        if self.quantized_inputs is not None:
            encoder += f" for quantized inputs {self.quantized_inputs}"
        text = "\n".join([encoder, *(f"{a.name}={a.format}" for a in self.assignments)])
        return hashlib.sha256(text.encode()).hexdigest()
