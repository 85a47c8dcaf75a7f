"""The messages between the parent of a server and the child that serves."""

from typing import Literal

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.protocol import SystemInfo

GRACE_SECONDS = 5  # for what is being answered when the server is told to end


class Serve(FrozenModel):
    """Serve the model in this file; answered by Serving once it has been tried with sample_text.

    port 0 is any that is free. chat_format None is the file's own template. n_ctx is a multiple of
    256: llama.cpp rounds it up, while llama-cpp-python and its batches would keep to less.
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


class Serving(FrozenModel):
    """The server listens at this port; seconds is how long it took to get there."""

    kind: Literal["serving"] = "serving"
    port: int
    seconds: float
    system: SystemInfo
