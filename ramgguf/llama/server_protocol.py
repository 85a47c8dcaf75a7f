"""The messages between the server's front and the children that run the model for it.

All three children speak JSON lines: server (the model), chat (templates), grammar (one grammar).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.protocol import SystemInfo

GRACE_SECONDS = 5  # for requests in flight when the server is asked to end


class Serve(FrozenModel):
    """Serve the model in this file; answered by Loaded once it has been tried with sample_text.

    port 0 is any that is free. chat_format None is the file's own template. n_ctx is a multiple of
    256: llama.cpp rounds it up, while llama-cpp-python and its batches would keep to less.
    growth_bytes is what the process may take beyond what it has when it is loaded.
    """

    path: str
    alias: str
    host: str
    port: int
    api_key: str | None
    n_ctx: int
    n_threads: int
    type_k: str
    type_v: str
    chat_format: str | None
    safe_kernels: bool
    verbose: bool
    sample_text: str
    growth_bytes: int


class Serving(FrozenModel):
    """The server listens at this port; seconds is how long it took to get there."""

    kind: Literal["serving"] = "serving"
    port: int
    seconds: float
    system: SystemInfo


class ModelDied(FrozenModel):
    """The model's process ended while it loaded; code is negative for a signal."""

    kind: Literal["died"] = "died"
    code: int


class ChatFormat(FrozenModel):
    """How chats become prompts: by a format of llama-cpp-python, or else by the template."""

    name: str | None
    template: str | None
    bos_token: str
    eos_token: str
    eos_id: int


class Loaded(FrozenModel):
    """The model is loaded and was tried."""

    kind: Literal["loaded"] = "loaded"
    system: SystemInfo
    chat: ChatFormat


class Generate(FrozenModel):
    """Continue a prompt. sampling are keyword arguments of create_completion, validated.

    add_special None: as the tokenizer asks for; else whether BOS is added to a chat's prompt.
    """

    kind: Literal["generate"] = "generate"
    id: int
    prompt: str
    add_special: bool | None = None
    max_tokens: int
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    sampling: dict[str, JsonValue] = Field(default_factory=dict)


class Tokenize(FrozenModel):
    kind: Literal["tokenize"] = "tokenize"
    id: int
    text: str


class Detokenize(FrozenModel):
    kind: Literal["detokenize"] = "detokenize"
    id: int
    tokens: tuple[int, ...]


class Cancel(FrozenModel):
    """Stop generating for the request of this id; it ends with Finished("cancelled")."""

    kind: Literal["cancel"] = "cancel"
    id: int


Request = Annotated[Generate | Tokenize | Detokenize | Cancel, Field(discriminator="kind")]


class Piece(FrozenModel):
    """What comes next in the text."""

    kind: Literal["piece"] = "piece"
    id: int
    text: str


class Finished(FrozenModel):
    """The last answer to Generate."""

    kind: Literal["finished"] = "finished"
    id: int
    reason: Literal["stop", "length", "cancelled"]
    n_prompt: int
    n_completion: int


class Tokens(FrozenModel):
    kind: Literal["tokens"] = "tokens"
    id: int
    tokens: tuple[int, ...]


class Text(FrozenModel):
    kind: Literal["text"] = "text"
    id: int
    text: str


class Refused(FrozenModel):
    """The request is wrong, or llama.cpp cannot do it."""

    kind: Literal["refused"] = "refused"
    id: int
    message: str
    code: str | None = None
    is_fault: bool = False  # ours, not the request's


Answer = Annotated[Piece | Finished | Tokens | Text | Refused, Field(discriminator="kind")]


class Render(FrozenModel):
    """Make a prompt of a chat."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    tool_choice: str | None
    max_bytes: int


class Rendered(FrozenModel):
    """The prompt, what ends an answer, and whether BOS is to be added; error where there is none"""

    prompt: str = ""
    stop: tuple[str, ...] = ()
    add_bos: bool = False
    error: str | None = None


class CheckGrammar(FrozenModel):
    """Whether llama.cpp can use a grammar, or the one of a JSON schema, for the file's tokens."""

    path: str
    grammar: str | None
    schema_text: str | None
    growth_bytes: int  # beyond what the vocabulary takes


class CheckedGrammar(FrozenModel):
    """The grammar as llama.cpp takes it, or what is wrong with it."""

    grammar: str = ""
    error: str | None = None
