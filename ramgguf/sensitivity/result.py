"""How much each tensor's error matters, as a value: α in nats of KLD per unit of NMSE."""

import hashlib
import statistics
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ramgguf.core.documents import Document, FrozenModel, NonNegative, NonNegativeFloat, Positive
from ramgguf.core.values import TokenKind
from ramgguf.gguf.identity import Source
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource

FIRST_TOKENS = 8
Origin = Literal["measured", "carried", "interpolated", "idle", "role"]


class ProbeTokens(FrozenModel):
    """The tokens that were decoded; sha256 is over their ids.

    text names the file for kind text, and the sources, with their weights, for several.
    """

    kind: TokenKind | Literal["several"]
    n_sequences: Positive
    n_tokens: Positive
    seed: NonNegative
    sha256: str
    text: str | None = None


class Reading(FrozenModel):
    """One tensor replaced by its quantization in `format`: NMSE, mean KLD in nats per token.

    standard_error is of the mean, from means of blocks of neighbouring tokens. late_kld is the mean
    without the FIRST_TOKENS of each sequence, which scores leave out, too.
    """

    name: str
    format: str
    nmse: NonNegativeFloat
    kld: NonNegativeFloat
    standard_error: NonNegativeFloat
    late_kld: NonNegativeFloat | None = None

    @property
    def alpha(self) -> float:
        """Nats per unit of NMSE; 0 when the quantization is lossless."""
        return self.kld / self.nmse if self.nmse > 0 else 0.0


class LayerReading(FrozenModel):
    """One tensor replaced by its quantization in `format`: NMSE, and what that does to a layer.

    error is Σδ²/Σx² of the residual stream x after the layer, the mean over tokens.
    """

    name: str
    format: str
    nmse: NonNegativeFloat
    layer: NonNegative
    error: NonNegativeFloat


class TensorSensitivity(FrozenModel):
    """What a tensor's α is taken to be, with its relative standard error, and where it is from.

    measured: from its reading, shrunk to its role's median by the reading's error. carried: from
    its layer reading, times the KLD per error of its role in the layers around it. interpolated:
    from its role's readings in the layers around it. idle: the tokens never exercised it, so it
    has its role's median. role: nothing was read near it, so it has the role's median, too.
    """

    name: str
    role: str
    layer: NonNegative | None
    n_weights: Positive
    alpha: NonNegativeFloat
    relative_error: NonNegativeFloat
    origin: Origin
    reading: Reading | None = None
    layer_reading: LayerReading | None = None


class Sensitivity(Document):
    """The sensitivities of all tensors that can be quantized, in the order of the file.

    With an importance matrix, α is per unit of the NMSE that it weighs. cpus names the CPUs that
    computed, stand_in the format of the stand-in that the passes ran on.
    """

    KIND: ClassVar[str] = "sensitivity"
    VERSION: ClassVar[int] = 2  # 2: source.sample_sha256

    ramgguf_version: str
    source: Source
    encoder: EncoderName
    imatrix: ImportanceSource | None = None
    engine: str
    cpus: tuple[str, ...] = ()
    stand_in: str | None = None
    tokens: ProbeTokens
    tensors: Annotated[tuple[TensorSensitivity, ...], Field(min_length=1)]
    seconds: NonNegativeFloat = 0.0
    notes: tuple[str, ...] = ()

    def late_shares(self) -> dict[str, float]:
        """Return what share of each tensor's KLD falls on tokens that scores count.

        What was not read has its role's median; there is none for files that do not say it.
        """
        by_role: dict[str, list[float]] = {}
        found: dict[str, float] = {}
        for t in self.tensors:
            if t.reading is not None and t.reading.late_kld is not None and t.reading.kld > 0:
                found[t.name] = t.reading.late_kld / t.reading.kld
                by_role.setdefault(t.role, []).append(found[t.name])
        if not found:
            return {}
        every = statistics.median(found.values())
        medians = {role: statistics.median(shares) for role, shares in by_role.items()}
        return {t.name: found.get(t.name, medians.get(t.role, every)) for t in self.tensors}

    def sha256(self) -> str:
        """Return the hash of the αs, by which a plan names what it was made with."""
        text = "\n".join(f"{t.name}={t.alpha!r}" for t in self.tensors)
        return hashlib.sha256(text.encode()).hexdigest()
