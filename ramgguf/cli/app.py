"""The application: its commands, and how errors end it."""

import gc
import os
import sys

import typer

from ramgguf import _core
from ramgguf.cli import (
    calibration_commands,
    card_command,
    check_commands,
    eval_commands,
    model_commands,
    pick_commands,
    plan_commands,
    sensitivity_commands,
    serve_commands,
)
from ramgguf.core.errors import RamggufError
from ramgguf.core.version import __version__

app = typer.Typer(
    name="ramgguf",
    help="Fit a GGUF language model to a byte budget, for stock llama.cpp.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print version, build and ISA level."),
) -> None:
    if version:
        levels = ", ".join(_core.supported_isas())
        typer.echo(
            f"ramgguf {__version__} (core built by {_core.compiler}; ISA level {_core.isa()} of "
            f"{levels})"
        )
        raise typer.Exit


model_commands.register(app)
plan_commands.register(app)
sensitivity_commands.register(app)
calibration_commands.register(app)
eval_commands.register(app)
check_commands.register(app)
pick_commands.register(app)
card_command.register(app)
serve_commands.register(app)


def main() -> None:
    """Run the command line; RamggufError ends it with one line on stderr and exit status 1."""
    # A large model is many thousand small values, and no cycles: looking for some is a quarter of
    # the time that they take.
    gc.set_threshold(200_000)
    try:
        app()
    except RamggufError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; no file was left half-written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
