"""The messages between a trial's parent and its child."""

from typing import Literal

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.kind import ModelKind
from ramgguf.llama.protocol import SystemInfo


class Load(FrozenModel):
    """Load the model and make a context; limit is on the process's data, in bytes."""

    kind: Literal["load"] = "load"
    path: str
    n_ctx: int
    n_threads: int
    type_k: str = "F16"
    type_v: str = "F16"
    limit: int | None = None
    mapped: bool = False


class Loaded(FrozenModel):
    """What was loaded: buffers in bytes (0 where llama.cpp does not tell).

    n_ctx is the context's, which of an embedding model is no more than what it was trained on.
    """

    kind: Literal["loaded"] = "loaded"
    seconds: float
    weights: int
    cache: int
    compute: int
    n_vocab: int
    system: SystemInfo
    kind_of_model: ModelKind = "causal"
    n_ctx: int


class Fill(FrozenModel):
    """Fill the context with this text, again and again, and generate the last n_generated.

    An embedding model generates nothing: the whole context is text.
    """

    kind: Literal["fill"] = "fill"
    text: str
    n_generated: int


class Filled(FrozenModel):
    """How long filling took, tokens/s of generation at its end, the process's peak in bytes.

    generation is None for an embedding model.
    """

    kind: Literal["filled"] = "filled"
    n_tokens: int
    seconds: float
    generation: float | None
    peak_bytes: int


class Time(FrozenModel):
    """Time prompts of n_prompt tokens and n_generated tokens after them, n_repeats times."""

    kind: Literal["time"] = "time"
    text: str
    n_prompt: int
    n_generated: int
    n_repeats: int


class Rates(FrozenModel):
    """Tokens per second, one for each repeat; an embedding model has no generation."""

    kind: Literal["rates"] = "rates"
    n_prompt: int
    prompt: tuple[float, ...]
    generation: tuple[float, ...]


class Talk(FrozenModel):
    """Answer prompts with at most n_tokens each, sampled at a temperature."""

    kind: Literal["talk"] = "talk"
    prompts: tuple[str, ...]
    n_tokens: int
    temperature: float
    seed: int


class Asked(FrozenModel):
    """An answer: its tokens, its bytes in hexadecimal, whether the model ended it."""

    prompt: str
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text_hex: str
    ended: bool
    first_seconds: float


class Conversation(FrozenModel):
    kind: Literal["conversation"] = "conversation"
    answers: tuple[Asked, ...]


class ScoreText(FrozenModel):
    """Score a text, or tokens from `first` on, those before being their context."""

    kind: Literal["score_text"] = "score_text"
    text: str | None = None
    ids: tuple[int, ...] = ()
    first: int = 1


class Scored(FrozenModel):
    """The sum of the negative log-likelihoods in nats; None where logits are not finite."""

    kind: Literal["scored"] = "scored"
    n_tokens: int
    nll: float | None
