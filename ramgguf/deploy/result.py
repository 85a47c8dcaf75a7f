"""What a deployment test found: a value and its file."""

import statistics
from collections.abc import Sequence
from typing import ClassVar, Literal

from ramgguf.core.documents import (
    Document,
    FrozenModel,
    NonNegative,
    NonNegativeFloat,
    Number,
    Positive,
)
from ramgguf.gguf.identity import FileIdentity, Identified, difference
from ramgguf.llama.kind import ModelKind
from ramgguf.llama.protocol import SystemInfo
from ramgguf.plan.result import MemoryUse


class Spread(FrozenModel):
    """The median of n repeats, the smallest and the largest."""

    median: NonNegativeFloat
    low: NonNegativeFloat
    high: NonNegativeFloat
    n: Positive

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(
            median=statistics.median(values), low=min(values), high=max(values), n=len(values)
        )


class Speed(FrozenModel):
    """Tokens per second of prompts of n_prompt tokens and of generation; first token in seconds.

    filling and generation_full are tokens per second while and after the context was filled. What
    generates nothing (an embedding model) has None there.
    """

    n_prompt: Positive
    prompt: Spread
    generation: Spread | None
    first_token_seconds: Spread | None
    filling: NonNegativeFloat
    generation_full: NonNegativeFloat | None


class Answer(FrozenModel):
    """What the model said to a prompt, and the signs of collapse in it.

    surprise is how many nats per token more than its own answers the reference finds it.
    """

    prompt: str
    text: str
    n_tokens: NonNegative
    ended: bool
    signs: tuple[str, ...]
    surprise: Number | None = None


Stage = Literal["load", "fill", "time", "talk", "score"]


class CheckResult(Document):
    """A deployment test: where it was run, how far it came, what was measured, pass or fail.

    limit_method says how the limit was imposed; peak_bytes is the process's most, with everything
    that Python takes; known_ppl is the perplexity of a known paragraph. An embedding model, which
    model_kind tells, is neither asked nor scored, and n_ctx is no more than it was trained on.
    Where the test ended early, failed_stage says at what, and what was not measured is None.
    """

    KIND: ClassVar[str] = "check"
    VERSION: ClassVar[int] = 3  # 2: sample_sha256; 3: model_kind

    ramgguf_version: str
    path: str
    n_bytes: Positive
    header_sha256: str | None = None
    sample_sha256: str | None = None
    name: str | None
    model_kind: ModelKind = "causal"
    n_ctx: Positive
    type_k: str
    type_v: str
    n_threads: Positive
    limit: Positive
    limit_source: str
    limit_method: str
    planned: MemoryUse
    planned_by: Literal["llama.cpp", "estimate"]
    system: SystemInfo | None = None
    load_seconds: NonNegativeFloat | None = None
    peak_bytes: NonNegative | None = None
    speed: Speed | None = None
    answers: tuple[Answer, ...] = ()
    known_ppl: NonNegativeFloat | None = None
    reference: str | None = None
    failed_stage: Stage | None = None
    failures: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()

    def differs(self, file: Identified) -> str | None:
        """Return how the file that was tested differs from this one; None if it is the same.

        Results of older versions tell less of their file: then less is compared.
        """
        return difference(
            file,
            FileIdentity(
                self.path, self.n_bytes, self.header_sha256 or file.header_sha256,
                self.sample_sha256,
            ),
        )  # fmt: skip

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def margin(self) -> int | None:
        """Bytes left of the limit at the peak; None where no peak was reached."""
        return None if self.peak_bytes is None else self.limit - self.peak_bytes
