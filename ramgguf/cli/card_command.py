"""The command that writes a model card: card."""

from pathlib import Path
from typing import Annotated

import typer

from ramgguf.cli import options as opt
from ramgguf.core.errors import PlanError
from ramgguf.core.files import write_atomically
from ramgguf.core.units import format_bytes
from ramgguf.report.card import model_card
from ramgguf.report.card_sources import card as _card


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(
        "card",
        epilog="Example: ramgguf card small.gguf --plan plan.json --results s.jsonl -o README.md",
    )(card)


def card(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="The GGUF file; any shard of it.")],
    plan: Annotated[
        Path | None, typer.Option("--plan", help="The plan that it was made by.")
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option("--results", help="What eval wrote of it, and of others; repeatable."),
    ] = None,
    check: Annotated[
        Path | None, typer.Option("--check", help="What check --json printed of it.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; default: print it.")
    ] = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a model card: Markdown with plan, scores and provenance, from these files alone."""
    terminal = opt.Terminal.make(quiet=quiet, as_json=False)
    opt.refuse_existing(output, force=force)
    text = model_card(_card(terminal.fetched(model), plan, results or (), check))
    if output is None:
        print(text, end="")
        return
    write_atomically(output, text.encode(), error=PlanError)
    terminal.out.print(f"wrote {output} ({format_bytes(output.stat().st_size)})", soft_wrap=True)
