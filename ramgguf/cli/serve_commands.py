"""The command that serves a file to OpenAI clients: serve."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from ramgguf.cli import memory_options as mem
from ramgguf.cli import options as opt
from ramgguf.core.escape import to_json
from ramgguf.core.machine import memory_limit
from ramgguf.core.parallel import default_threads
from ramgguf.deploy.footprint import parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.result import CheckResult
from ramgguf.deploy.serving import Place, Server, Settings, checked_settings, planned_settings
from ramgguf.report.serving import lines, summary

_CONTEXT = 4096
_KEY_VARIABLE = "RAMGGUF_API_KEY"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("serve", epilog="Example: ramgguf serve model-4.5bpw.gguf --context 8192")(serve)


def serve(
    model: opt.AnyModel,
    check: Annotated[
        Path | None,
        typer.Option("--check", help="What `check --json` printed, for its settings."),
    ] = None,
    memory: mem.RunsIn = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=16, help="Tokens; default: 4096."),
    ] = None,
    cache_type: Annotated[
        str | None,
        typer.Option("--cache-type", help="Of keys and values: f16 (default), q8_0, q8_0,f16."),
    ] = None,
    threads: opt.Threads = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 for any that is free.")
    ] = 8000,
    alias: Annotated[
        str | None, typer.Option("--alias", help="The model's name; default: the file's.")
    ] = None,
    chat_format: Annotated[
        str | None,
        typer.Option(
            "--chat-format",
            help="Default: the file's template; without one, chatml.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=_KEY_VARIABLE, help="What clients must send."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another name that clients may call this server by."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", help="Web pages that may ask: https://example.org."),
    ] = None,
    allow_grammars: Annotated[
        bool, typer.Option("--allow-grammars", help="Take grammars and JSON schemas of clients.")
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Most tokens of an answer; default: the context."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=0, max=200, help="Requests that may wait for their turn.")
    ] = 16,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0.1, help="Seconds that an answer may take.")
    ] = 600,
    safe_kernels: Annotated[
        bool | None,
        typer.Option(
            "--safe-kernels/--no-safe-kernels",
            help="Without llama.cpp's repacked kernels; default: only if it crashes with them.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Serve what does not fit, or failed its check.")
    ] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print requests and llama.cpp's log.")
    ] = False,
) -> None:
    """Serve a file to OpenAI clients, with settings that fit this machine or that check found."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json)
    signal.signal(signal.SIGTERM, _interrupt)
    place = Place(
        host=host,
        port=port,
        # Click ignores an empty variable, and the server would be open to all.
        api_key=os.environ.get(_KEY_VARIABLE) if api_key is None else api_key,
        safe_kernels=safe_kernels,
        verbose=verbose,
        hosts=tuple(allow_host or ()),
        origins=tuple(allow_origin or ()),
        max_tokens=max_tokens,
        n_waiting=queue,
        seconds=time_limit,
    )
    model = terminal.fetched(model)
    if check is None:
        settings = planned_settings(
            model,
            ContextShape(context or _CONTEXT, 1, *parse_cache_types(cache_type or "f16")),
            memory_limit(memory),
            n_threads=threads or default_threads(),
            allow_grammars=allow_grammars,
            force=force,
        )
    elif context is None and cache_type is None and threads is None:
        settings = checked_settings(
            model,
            CheckResult.load(check),
            memory_limit(memory),
            allow_grammars=allow_grammars,
            force=force,
        )
    else:
        raise typer.BadParameter(
            "context, cache type and threads are those of the check", param_hint="--check"
        )
    settings = replace(
        settings, alias=alias or settings.alias, chat_format=chat_format or settings.chat_format
    )
    _serve(settings, place, terminal, as_json=as_json)


def _serve(settings: Settings, place: Place, terminal: opt.Terminal, *, as_json: bool) -> None:
    with Server(settings, place, announce=terminal.announce) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        if as_json:
            print(to_json(summary(server)), flush=True)
        for line in lines(server):
            terminal.out.print(line, soft_wrap=True)
        server.wait()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
