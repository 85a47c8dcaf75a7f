"""Results of an evaluation: one value per model, which can be compared without the model."""

import hashlib
import math
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from ramgguf.core.corpus import Text
from ramgguf.core.documents import (
    Document,
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Number,
    Positive,
)
from ramgguf.core.units import format_count
from ramgguf.core.values import HubFile
from ramgguf.evaluate.llama_statistics import LlamaStatistics, llama_statistics
from ramgguf.llama.protocol import Float32Array, Opened, decode_float32

LOGITS = "logits"  # the file type of a reference that is a file of logits, not a model


class ModelFile(FrozenModel):
    """Which file was scored.

    header_sha256 covers the bytes before the tensor data, sample_sha256 a sample of the data (None
    in files of versions that did not take one).
    """

    path: str
    n_bytes: Positive
    header_sha256: str
    sample_sha256: str | None = None
    architecture: str
    file_type: str
    name: str | None = None
    n_weights: Positive
    plan_sha256: str | None = None
    hub: HubFile | None = None

    @property
    def label(self) -> str:
        """The file's name without folder and suffix: what tables call the model."""
        stem = self.path.replace("\\", "/").rsplit("/", 1)[-1]
        return stem.removesuffix(".gguf")

    @property
    def is_model(self) -> bool:
        """Whether it has weights: a reference may be a file of logits, whose size says nothing."""
        return self.file_type != LOGITS

    @property
    def bpw(self) -> float:
        """Bits of file per weight."""
        return 8 * self.n_bytes / self.n_weights


def n_files(models: Iterable[ModelFile]) -> int:
    """Return how many different files these are; one without a sample is any of its header."""
    samples: dict[str, set[str]] = {}
    for model in models:
        samples.setdefault(model.header_sha256, set()).update(filter(None, [model.sample_sha256]))
    return sum(max(1, len(found)) for found in samples.values())


class Protocol(FrozenModel):
    """How the text became sequences and which of their tokens count.

    A target is the token that a position predicts: target i is token i, predicted from tokens
    0 … i−1. Targets first_target … n_ctx−1 of every sequence are scored. n_windows is how many
    windows the text gave, n_seq how many were drawn; seed is None where none are drawn. bos says
    that every sequence starts with BOS: in front of the text's own tokens, so that the last of
    them falls off (ram), or in place of the first of them (llama). n_warm_up tokens that the model
    reads before a text (BOS, the start of its chat template) stand before each window (warm).
    """

    name: Literal["ram", "warm", "llama"]
    n_ctx: Positive
    n_windows: Positive
    n_seq: Positive
    n_seq_wanted: Positive | None = None
    seed: int | None
    bos: bool
    first_target: Positive
    n_warm_up: NonNegative = 0

    @property
    def n_scored(self) -> int:
        """Scored tokens per sequence."""
        return self.n_ctx - self.first_target


class EngineSettings(FrozenModel):
    """What ran the model. Results whose compute settings differ are not ranked together."""

    llama_cpp_python: str
    llama_cpp_build: str
    system_info: str
    cpu: str
    n_threads: Positive
    n_batch: Positive
    safe_kernels: bool

    @classmethod
    def of(cls, opened: Opened, n_threads: int, *, safe_kernels: bool) -> Self:
        """Return the settings of models that a process of llama.cpp opened."""
        return cls(
            llama_cpp_python=opened.system.llama_cpp_python,
            llama_cpp_build=opened.system.build,
            system_info=opened.system.system_info,
            cpu=opened.system.cpu,
            n_threads=n_threads,
            n_batch=opened.n_batch,
            safe_kernels=safe_kernels,
        )


_ROUNDING = 1e-5  # nats per token by which a sum of losses may be below 0
_KLD_ROUNDING = 16 / 65535 / 2  # and of KLD, against log-probabilities of 16 bits


FIRST_TOKENS = 8  # of a window: so little context makes their KLD another quantity (statistics.md)


class TokenSums(FrozenModel):
    """Sums over groups of scored tokens: how many, their KLD in nats, equal top tokens."""

    n: tuple[NonNegative, ...]
    kld_sum: tuple[Number, ...]
    n_same_top: tuple[NonNegative, ...]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not len(self.n) == len(self.kld_sum) == len(self.n_same_top):
            raise ValueError("groups of tokens: three rows of one length expected")
        return self


class WorstToken(FrozenModel):
    """A token of large KLD: its position, its text and the text before it; nats."""

    position: NonNegative
    text: str
    before: str
    kld: Number
    nll: Number
    reference_nll: Number | None = None


class SequenceScore(FrozenModel):
    """The scores of one sequence: sums over its scored tokens, in nats.

    index is the window's place in the text, title the heading it falls under (its article),
    text_start and text_end its span in the text's UTF-8 bytes, excerpt the start of that span.
    The fields from kld_sum on are there when a reference was scored alongside: KLD is
    KL(reference ‖ model), n_same_top counts equal most probable tokens, Δp is the probability of
    the target under the model minus that under the reference. token_nll, token_reference_nll and
    token_kld are base64 of little-endian float32, one per scored token, token_same_top of bits
    (numpy.packbits); `without_tokens` drops them. by_position, by_class and worst_tokens are as in
    token_groups.py.
    """

    index: NonNegative
    title: str | None = None
    text_start: NonNegative
    text_end: NonNegative
    excerpt: str
    n_scored: Positive
    nll_sum: Number
    token_nll: str | None = None
    reference_nll_sum: Number | None = None
    kld_sum: Number | None = None
    kld_max: Number | None = None
    n_same_top: NonNegative | None = None
    delta_p_sum: Number | None = None
    delta_p_squared_sum: NonNegativeFloat | None = None
    token_kld: str | None = None
    token_same_top: str | None = None
    by_position: TokenSums | None = None
    by_class: TokenSums | None = None
    worst_tokens: tuple[WorstToken, ...] = ()
    token_reference_nll: str | None = None

    @field_validator("token_nll", "token_kld", "token_reference_nll")
    @classmethod
    def _check_tokens(cls, text: str | None) -> str | None:
        if text is not None and not np.isfinite(decode_float32(text)).all():
            raise ValueError("NaN or infinity among the values")
        return text

    @model_validator(mode="after")
    def _check_signs(self) -> Self:
        for what in ("nll_sum", "reference_nll_sum", "kld_sum"):
            value = getattr(self, what)
            slack = _KLD_ROUNDING if what == "kld_sum" else _ROUNDING
            if value is not None and value < -slack * self.n_scored:
                raise ValueError(f"{what} of sequence {self.index} is {value:g}, expected ≥ 0")
        if self.n_same_top is not None and self.n_same_top > self.n_scored:
            raise ValueError(f"{self.n_same_top} equal top tokens of {self.n_scored} scored")
        return self

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        for values in (
            self.nll_per_token(),
            self.kld_per_token(),
            self.reference_nll_per_token(),
        ):
            if values is not None and len(values) != self.n_scored:
                raise ValueError(f"{len(values)} values of {self.n_scored} scored tokens")
        for sums in (self.by_position, self.by_class):
            if sums is not None and sum(sums.n) != self.n_scored:
                raise ValueError(f"groups of {sum(sums.n)} tokens, {self.n_scored} were scored")
        return self

    @property
    def mean_nll(self) -> float:
        """Mean NLL of the scored tokens, nats."""
        return self.nll_sum / self.n_scored

    @property
    def ppl(self) -> float:
        """Sequence PPL, exp of the mean NLL; infinite where that overflows."""
        return math.exp(self.mean_nll) if self.mean_nll < 709 else math.inf

    def nll_per_token(self) -> Float32Array | None:
        """Return the NLL of each scored token, or None where they were not kept."""
        return None if self.token_nll is None else decode_float32(self.token_nll)

    def kld_per_token(self) -> Float32Array | None:
        """Return the KLD of each scored token, or None where they were not kept."""
        return None if self.token_kld is None else decode_float32(self.token_kld)

    def reference_nll_per_token(self) -> Float32Array | None:
        """Return the reference's NLL of each scored token, or None where they were not kept."""
        return (
            None if self.token_reference_nll is None else decode_float32(self.token_reference_nll)
        )


class BrokenSequence(FrozenModel):
    """A sequence whose logits held NaN or inf at n_broken targets, target first_broken first.

    in_model and in_reference say whose logits these were. It is reported and never averaged: such
    a model computes no probabilities there.
    """

    index: NonNegative
    title: str | None = None
    n_broken: Positive
    first_broken: NonNegative
    in_model: bool = True
    in_reference: bool = False


class Quantiles(FrozenModel):
    """Quantiles of a per-token quantity: value[i] at probability p[i] (linear interpolation)."""

    p: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    value: tuple[Number, ...]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if len(self.p) != len(self.value):
            raise ValueError(f"{len(self.p)} probabilities but {len(self.value)} values")
        if missing := set(QUANTILES) - set(self.p):
            raise ValueError(f"the quantiles at {sorted(missing)} are missing")
        return self

    def at(self, p: float) -> float:
        """Return the quantile at p; raises KeyError where it was not computed."""
        if p not in self.p:
            raise KeyError(f"no quantile at {p}; there are {self.p}")
        return self.value[self.p.index(p)]


QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


class EvalResult(Document):
    """The scores of one model on one text, sequence by sequence, in the order of the text.

    sequences holds the finished ones and broken those with NaN or inf logits; failure says why
    the others are missing (llama.cpp crashed). token_ids_sha256 is of all sequences' token ids
    (little-endian int32): results in which it is equal scored the same tokens. kld_quantiles are
    over all scored tokens of the finished sequences, kld_worst_share is the share of their KLD that
    the worst thousandth of them carries. llama_statistics are llama-perplexity's, kept where tokens
    are not. cpus names the CPUs that computed, where there were several.
    """

    KIND: ClassVar[str] = "eval"
    VERSION: ClassVar[int] = 2  # 2: model.sample_sha256

    ramgguf_version: str
    model: ModelFile
    reference: ModelFile | None = None
    protocol: Protocol
    text: Text
    tokenizer_sha256: str
    token_ids_sha256: str
    engine: EngineSettings
    sequences: tuple[SequenceScore, ...]
    broken: tuple[BrokenSequence, ...] = ()
    kld_quantiles: Quantiles | None = None
    kld_worst_share: Annotated[float, Field(ge=0, le=1)] | None = None
    llama_statistics: LlamaStatistics | None = None
    cpus: tuple[str, ...] = ()
    failure: str | None = None
    notes: tuple[str, ...] = ()
    seconds: NonNegativeFloat = 0.0
    decode_seconds: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_places(self) -> Self:
        places = [s.index for s in self.sequences] + [b.index for b in self.broken]
        twice = (
            sorted({i for i in places if places.count(i) > 1})
            if len(set(places)) < len(places)
            else []
        )
        if twice:
            raise ValueError(f"sequence {twice[0]} is there twice")
        return self

    @property
    def n_scored(self) -> int:
        """Scored tokens of all finished sequences."""
        return sum(s.n_scored for s in self.sequences)

    @property
    def kld_mean(self) -> float:
        """Mean KLD per token in nats; NaN where there was no reference."""
        sums = [s.kld_sum for s in self.sequences if s.kld_sum is not None]
        return sum(sums) / self.n_scored if len(sums) == len(self.sequences) > 0 else math.nan

    @property
    def complete(self) -> bool:
        """Whether every sequence of the protocol was scored."""
        return len(self.sequences) == self.protocol.n_seq

    def without_tokens(self) -> Self:
        """Return the result without per-token arrays: some kB instead of some MB."""
        arrays = ("token_nll", "token_kld", "token_reference_nll", "token_same_top")
        bare = dict.fromkeys(arrays)
        slim = tuple(s.model_copy(update=bare) for s in self.sequences)
        update = {"sequences": slim, "llama_statistics": self.as_llama_perplexity()}
        return self.model_copy(update=update)

    def as_llama_perplexity(self) -> LlamaStatistics | None:
        """Return llama-perplexity's statistics against the reference, where they are known."""
        values = [
            (s.nll_per_token(), s.reference_nll_per_token(), s.kld_per_token())
            for s in self.sequences
        ]
        kept = [(q, p, d) for q, p, d in values if not (q is None or p is None or d is None)]
        if len(kept) < len(values) or not kept:
            return self.llama_statistics
        nll, nll_base, kld = zip(*kept, strict=True)
        n_same_top = sum(s.n_same_top or 0 for s in self.sequences)
        return llama_statistics(nll, nll_base, kld, n_same_top)


def incomparable(a: EvalResult, b: EvalResult) -> tuple[str, ...]:
    """Return the reasons why a and b must not be ranked together; empty where they may be.

    Thread counts and CPUs may differ: they change a mean NLL by rounding only. Batch sizes,
    llama.cpp builds and kernels are settings of the measurement.
    """
    pairs = (
        ("text", a.text.sha256, b.text.sha256),
        ("protocol", _comparable_protocol(a.protocol), _comparable_protocol(b.protocol)),
        ("tokenizer", a.tokenizer_sha256, b.tokenizer_sha256),
        ("token ids", a.token_ids_sha256, b.token_ids_sha256),
        ("llama.cpp build", a.engine.llama_cpp_build, b.engine.llama_cpp_build),
        ("tokens per batch", str(a.engine.n_batch), str(b.engine.n_batch)),
        ("safe kernels", str(a.engine.safe_kernels), str(b.engine.safe_kernels)),
    )
    return tuple(
        f"{what}: {left} for {a.model.label}, {right} for {b.model.label}"
        for what, left, right in pairs
        if left != right
    )


def _comparable_protocol(p: Protocol) -> str:
    drawn = f"seed {p.seed}" if p.seed is not None else "in order"
    bos = "BOS" if p.bos else "no BOS"
    bos += f" and what precedes a text, {format_count(p.n_warm_up, 'token')}" if p.n_warm_up else ""
    return (
        f"{p.name}, {p.n_seq} × {p.n_ctx} tokens, {drawn}, {bos}, scored from {p.first_target} on"
    )


def sha256_int32(ids: npt.ArrayLike) -> str:
    """Return the sha256 of token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def kld_figures(sequences: Iterable[SequenceScore]) -> dict[str, object]:
    """Return kld_quantiles and kld_worst_share of a result with these sequences.

    Both are None where not every sequence has kept its tokens' KLD.
    """
    found = [s.kld_per_token() for s in sequences]
    known = [k for k in found if k is not None]
    if not known or len(known) < len(found):
        return {"kld_quantiles": None, "kld_worst_share": None}
    values = np.sort(np.concatenate(known).astype(np.float64))
    n_worst = -(-len(values) // 1000)
    whole = float(np.maximum(values, 0).sum())
    share = float(np.maximum(values[-n_worst:], 0).sum()) / whole if whole > 0 else 0.0
    return {"kld_quantiles": quantiles(values), "kld_worst_share": min(1.0, share)}


def quantiles(values: npt.ArrayLike) -> Quantiles:
    """Return the QUANTILES of the values."""
    found = np.quantile(np.asarray(values, dtype=np.float64), QUANTILES)
    return Quantiles(p=QUANTILES, value=tuple(float(v) for v in found))
