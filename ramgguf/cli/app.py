"""The application: its commands, and how errors end it."""

import contextlib
import errno
import gc
import io
import os
import signal
import sys

import typer

from ramgguf import _core
from ramgguf.cli import (
    behaviour_commands,
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
from ramgguf.core.inputs import protected
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
behaviour_commands.register(app)
check_commands.register(app)
pick_commands.register(app)
card_command.register(app)
serve_commands.register(app)


class _EndedError(BaseException):
    """A signal asks the command to end; what is under way cleans up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _ClosedOutput(io.TextIOBase):
    """Standard output that was closed before the command began: writing to it is an error."""

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, _: str) -> int:
        raise OSError(errno.EBADF, "standard output is closed")


def _end(number: int, _: object) -> None:
    raise _EndedError(number)


def _prepare() -> None:
    """Make standard streams safe to print to, and have signals clean up."""
    # A large model makes many small values and no cycles; looking for cycles takes a quarter of
    # the time that the values take.
    gc.set_threshold(200_000)
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # no output may become file 0, 1 or 2
        pass
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def main() -> None:
    """Run the command line; an error ends it with one line on stderr and exit status 1."""
    _prepare()
    try:
        try:
            with protected():
                app()
        finally:
            sys.stdout.flush()  # here, where a full disk is still an error
    except RamggufError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("interrupted; no file was left half-written", file=sys.stderr)
        sys.exit(130)
    except _EndedError as e:
        name = signal.Signals(e.number).name
        print(f"ended by {name}; no file was left half-written", file=sys.stderr)
        sys.exit(128 + e.number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except MemoryError:
        _fail("out of memory; fewer --threads take less")
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        _fail(f"{where}{e.strerror or e}")


def _fail(message: str) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {message}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.exit(1)
    # What is left in the buffer cannot be written; Python would say so once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(1)
