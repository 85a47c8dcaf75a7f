"""The command that tries a file on this machine: check."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ramgguf.cli import memory_options as mem
from ramgguf.cli import options as opt
from ramgguf.core.escape import to_json
from ramgguf.core.machine import memory_limit
from ramgguf.core.parallel import default_threads
from ramgguf.deploy.checking import CheckRequest, check_file
from ramgguf.deploy.footprint import parse_cache_types
from ramgguf.deploy.footprint_formula import ContextShape
from ramgguf.deploy.result import CheckResult
from ramgguf.report.check import markdown as _markdown
from ramgguf.report.check import print_check, print_ratios

FAILED = 3  # the exit status of a file that does not pass


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "check", epilog="Example: ramgguf check model-4.5bpw.gguf --memory 16GB --context 8192"
    )(check)


def check(
    model: opt.AnyModel,
    memory: mem.RunsIn = None,
    context: Annotated[
        int, typer.Option("--context", min=16, help="Tokens of context, really filled.")
    ] = 4096,
    cache_type: mem.CacheType = "f16",
    against: Annotated[
        Path | None, typer.Option("--against", help="Try this file, too, and give ratios.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="The original: it judges the answers. Not limited."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of each timing.")] = 5,
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the result as Markdown, nothing else.")
    ] = False,
    quiet: opt.Quiet = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print all answers.")] = False,
) -> None:
    """Try a file on this machine: load, fill, time and question it within its memory.

    Exit status 0 says that it passes, 3 that it fails.
    """
    if as_json and markdown:
        raise typer.BadParameter("give one of --json and --markdown")
    terminal = opt.Terminal.make(quiet=quiet, as_json=as_json or markdown)
    request = CheckRequest(
        ContextShape(context, 1, *parse_cache_types(cache_type)),
        memory_limit(memory),
        n_threads=threads or default_threads(),
        n_repeats=repeats,
    )
    shown = terminal.err.print if not quiet and terminal.err.is_terminal else lambda _: None
    paths = [terminal.fetched(m) for m in (model, against) if m is not None]
    reference = reference and terminal.fetched(reference)
    results = [check_file(path, request, reference=reference, announce=shown) for path in paths]
    if as_json:
        print(_json(results))
    elif markdown:
        print(_markdown(results))
    else:
        for result in results:
            print_check(result, terminal.out, verbose=verbose)
        if len(results) == 2:
            print_ratios(results[0], results[1], terminal.out)
    if not results[0].passed:
        raise typer.Exit(FAILED)


def _json(results: list[CheckResult]) -> str:
    if len(results) == 1:
        return results[0].to_json()
    return to_json([json.loads(r.to_json()) for r in results], indent=1)
