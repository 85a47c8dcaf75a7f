"""What is served, under what settings, where, and how to ask it: three lines."""

import json
import shlex

from ramgguf.core.units import format_bytes, format_count
from ramgguf.deploy.serving import Server

_QUESTION = "Why is the sky blue?"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def lines(server: Server) -> list[str]:
    """Return what is served where, its settings, and a command that asks it."""
    settings = server.settings
    return [
        f"serving {settings.path} as {settings.alias} at {server.url} (Ctrl-C ends it)",
        f"  {conditions(server)}",
        f"  {curl(server)}",
    ]


def conditions(server: Server) -> str:
    """Return the settings in one sentence."""
    settings, place = server.settings, server.place
    shape, checked = settings.shape, settings.checked
    trained = settings.n_ctx_train
    beyond = f" (trained for {trained})" if trained is not None and trained < shape.n_ctx else ""
    parts = [
        f"context {shape.n_ctx}{beyond}",
        f"cache {shape.type_k}/{shape.type_v}",
        f"{format_count(settings.n_threads, 'thread')}",
        f"chat in {settings.chat_format or 'the file’s template'}",
        f"memory {format_bytes(settings.needed)} ({settings.needed_by})",
    ]
    if checked is not None and checked.speed is not None and checked.speed.generation is not None:
        parts.append(f"{checked.speed.generation.median:.1f} tokens/s when checked")
    if server.safe_kernels:
        parts.append("safe kernels")
    if place.host not in _LOOPBACK:
        asks = "with the key" if place.api_key else "without a key: see --api-key"
        parts.append(f"other machines may ask, {asks}")
    return ", ".join(parts)


def curl(server: Server) -> str:
    """Return a shell command that asks a question."""
    body = {"messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64}
    key = ' -H "Authorization: Bearer $RAMGGUF_API_KEY"' if server.place.api_key else ""
    return (
        f"curl {shlex.quote(server.url + '/chat/completions')} "
        f"-H 'Content-Type: application/json'{key} -d {shlex.quote(json.dumps(body))}"
    )


def summary(server: Server) -> dict[str, object]:
    """Return the same as JSON values."""
    settings = server.settings
    return {
        "url": server.url,
        "model": settings.alias,
        "path": str(settings.path),
        "n_ctx": settings.shape.n_ctx,
        "type_k": settings.shape.type_k,
        "type_v": settings.shape.type_v,
        "n_threads": settings.n_threads,
        "chat_format": settings.chat_format,
        "memory": settings.needed,
        "memory_by": settings.needed_by,
        "safe_kernels": server.safe_kernels,
        "llama_cpp": server.serving.system.build,
        "start_seconds": server.serving.seconds,
    }
