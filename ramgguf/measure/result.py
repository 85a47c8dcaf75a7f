"""What measuring finds: every tensor's rate–distortion curve, a value and its file."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from ramgguf.core.documents import (
    Document,
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Number,
    Positive,
)
from ramgguf.gguf.identity import Source
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a tensor's rate–distortion curve: its bytes and loss in a format.

    nmse_error is the standard error of an NMSE that was measured on a sample of the rows. Where
    nmse is weighted by importance, plain_nmse is unweighted. A model may have hundreds of thousands
    of points: they are small, and checked when they come from a file.
    """

    __pydantic_config__ = FrozenModel.model_config

    format: str
    n_bytes: Positive
    nmse: NonNegativeFloat
    max_error: NonNegativeFloat
    nmse_error: NonNegativeFloat = 0.0
    plain_nmse: NonNegativeFloat | None = None

    @property
    def unweighted(self) -> float:
        """The NMSE of the weights by themselves, where it is known."""
        return self.nmse if self.plain_nmse is None else self.plain_nmse

    @property
    def sqnr_db(self) -> float:
        """SQNR = −10 log10(NMSE) in dB; infinite for a lossless format."""
        return -10 * math.log10(self.nmse) if self.nmse > 0 else math.inf


class TensorMeasurement(FrozenModel):
    """What is known of one tensor: its statistics and its rate–distortion curve.

    shape is in ggml's order (row length first). points lists the candidates by ascending bytes,
    the source's own format included; excluded says why a format of the pass is no candidate.
    kept says why the tensor is not quantized at all (then points holds the source format only).
    output_squares is Σ wx² with the importance w of its columns: the mean squared output, were
    inputs uncorrelated; None without importance. grid is the format whose blocks hold the weights
    exactly, up to the rounding of the source's own type.
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
    grid: str | None = None

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        return self.shape[0]


class Measurement(Document):
    """The rate–distortion curves of a whole model.

    n_layers counts those of the trunk, without draft blocks, which come last.
    With an importance matrix, NMSE is Σ w(x−q)² / Σ w x² for the tensors that it has entries for.
    """

    KIND: ClassVar[str] = "measurement"
    VERSION: ClassVar[int] = 2  # 2: source.sample_sha256

    ramgguf_version: str
    source: Source
    encoder: EncoderName
    imatrix: ImportanceSource | None = None
    formats: tuple[str, ...]
    n_overhead_bytes: NonNegative
    alignment: Positive
    n_layers: NonNegative | None
    tensors: Annotated[tuple[TensorMeasurement, ...], Field(min_length=1)]
    seconds: Number = 0.0
    notes: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        return sum(t.n_weights for t in self.tensors)
