"""What clients may ask: OpenAI's requests for completions and chats, and the limits on them.

Every number has a range, and what is not known is refused: an option that does nothing is worse
than an error. Sampling options and their defaults are those of llama-cpp-python's server.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    model_validator,
)

from ramgguf.core.documents import FrozenModel

# What clients send and a server of one local model can ignore.
_IGNORED = frozenset(
    ("metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
     "store", "user")
)  # fmt: skip
_LOGPROBS = "logprobs is not supported: it takes the logits of the whole context"


# What one request takes in the model's process beyond what it has after loading, measured with
# llama-cpp-python 0.3.36: up to 165 bytes for each byte of a prompt that is one long word (its
# tokenizer's queue), and 9 MB for samplers. A grammar is tried with half of what it may take.
_BYTES_PER_PROMPT_BYTE = 192
_SAMPLING_BYTES = 32 << 20
GRAMMAR_BYTES = 64 << 20
# A prompt of more bytes than these for each token of the context does not fit it; a short context
# leaves room for a request that is refused because of its tokens, in words.
_BYTES_PER_TOKEN, _LEAST_BYTES = 32, 64 << 10


def prompt_bytes(n_ctx: int) -> int:
    """Return the most bytes of a prompt for a context of n_ctx tokens."""
    return max(_LEAST_BYTES, _BYTES_PER_TOKEN * n_ctx)


def request_bytes(n_prompt_bytes: int, *, allow_grammars: bool) -> int:
    """Return what one request may take in the model's process: what is planned is the limit."""
    grammar = 2 * GRAMMAR_BYTES if allow_grammars else 0
    return _SAMPLING_BYTES + _BYTES_PER_PROMPT_BYTE * n_prompt_bytes + grammar


class Limits(FrozenModel):
    """What one request may take, and how many may wait."""

    prompt_bytes: int
    max_tokens: int
    n_waiting: int = 16
    seconds: float = 600
    template_seconds: float = 2
    grammar_seconds: float = 5
    allow_grammars: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    @property
    def body_bytes(self) -> int:
        """Of a request: JSON escapes take up to three times the text, and the rest is small."""
        return 4 * self.prompt_bytes + (64 << 10)


_MOST_MESSAGES = 16_384  # of a chat, and parts of a message: each takes a kilobyte when it is read
_MOST_TOOLS = 1024  # also calls of a message
_MOST_BIASES = 1024

_T = TypeVar("_T")
# An error is kept for each wrong element, 1.3 kB of it: a list of all wrong ones took gigabytes.
_List = Annotated[list[_T], Field(fail_fast=True)]


def _of_few_biases(data: Any) -> Any:
    if isinstance(data, dict) and len(data) > _MOST_BIASES:  # before each is looked at
        raise ValueError(f"{len(data)} tokens, {_MOST_BIASES} at most")
    return data


_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]


class _Asked(BaseModel):
    """An object of a request. It has at most one unknown key when it is validated.

    An error is kept for each of these, too.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        found = {key: data[key] for key in known & data.keys()}
        unknown = next((key for key in data if key not in known and key not in _IGNORED), None)
        return found if unknown is None else found | {unknown: data[unknown]}


class StreamOptions(_Asked):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(_Asked):
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    json_schema: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.type == "text" and (self.schema_ is not None or self.json_schema is not None):
            raise ValueError("type text has no schema; json_schema has one")
        if not isinstance(self.schema_or_none, dict | None):
            raise ValueError("json_schema.schema must be an object")
        if self.type != "text" and self.schema_or_none is None:
            raise ValueError("json_schema.schema must be an object, not null")
        return self

    @property
    def schema_or_none(self) -> JsonValue:
        """The schema that the answer has to keep to; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is not None:
            return self.json_schema.get("schema", {"type": "object"})
        return self.schema_ or {"type": "object"}


class Generation(_Asked):
    """What requests for completions and chats have in common."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: _Stop | Annotated[_List[_Stop], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, ge=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000)
    repeat_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    mirostat_mode: int | None = Field(default=None, ge=0, le=2)
    mirostat_tau: float | None = Field(default=None, gt=0, le=10)
    mirostat_eta: float | None = Field(default=None, ge=0.001, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    logit_bias: Annotated[dict[_TokenId, _Bias], BeforeValidator(_of_few_biases)] | None = None
    grammar: str | None = Field(default=None, pattern=r"^[^\x00]+$")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """Return the keyword arguments of create_completion that the request names or implies."""
        names = (
            "temperature", "top_p", "min_p", "typical_p", "top_k", "repeat_penalty", "seed",
            "presence_penalty", "frequency_penalty", "mirostat_mode", "mirostat_tau",
            "mirostat_eta", "logit_bias",
        )  # fmt: skip
        asked = {name: getattr(self, name) for name in names}
        defaults = {"temperature": 0.8, "repeat_penalty": 1.1}
        return defaults | {name: value for name, value in asked.items() if value is not None}


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: str | Annotated[_List[str], Field(min_length=1, max_length=1)] = ""
    max_tokens: int | None = Field(default=16, ge=1)
    echo: bool = False
    best_of: Literal[1] | None = None
    logprobs: None = None

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("logprobs") is not None:
            raise ValueError(_LOGPROBS)
        return data

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class Message(_Asked):
    """One message of a chat; what else a template may look at is passed on."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[_List[TextPart], Field(max_length=_MOST_MESSAGES)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[_List[dict[str, JsonValue]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Return what templates expect: content is one text."""
        found = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            found["content"] = "\n".join(part.text for part in self.content)
        return found


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: _List[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    tools: Annotated[_List[dict[str, JsonValue]], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None

    @model_validator(mode="before")
    @classmethod
    def _no_logprobs(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("logprobs") or data.get("top_logprobs")):
            raise ValueError(_LOGPROBS)
        return data

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens exclude each other")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The most tokens of the answer, by either name; None for as many as may be."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class TokenizeRequest(_Asked):
    """POST /extras/tokenize and /extras/tokenize/count."""

    model: str | None = None
    input: str


class DetokenizeRequest(_Asked):
    """POST /extras/detokenize."""

    model: str | None = None
    tokens: _List[Annotated[int, Field(ge=0, lt=2**31)]]
