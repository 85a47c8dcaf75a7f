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
    calibration_commands,
    card_command,
    check_commands,
    end_at_once,
    eval_commands,
    model_commands,
    pick_commands,
    plan_commands,
    sensitivity_commands,
    serve_commands,
)
from ramgguf.core.errors import RamggufError
from ramgguf.core.escape import printable
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
    if number == signal.SIGINT:  # once more: do not wait for what is being cleaned up
        signal.signal(signal.SIGINT, end_at_once)
    raise _EndedError(number)


def _prepare(*, is_interruptible: bool) -> None:
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
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    # Not Python's KeyboardInterrupt, of which command-line libraries make their own endings.
    if is_interruptible:
        signal.signal(signal.SIGINT, _end)


def main(*, is_interruptible: bool = False) -> None:
    """Run the command line; an error ends it with one line on stderr and exit status 1.

    is_interruptible: Ctrl-C ends it with status 130, unless the command handles that itself.
    """
    status = 1
    try:
        try:
            _prepare(is_interruptible=is_interruptible)
            status = _run()
        finally:
            if is_interruptible:  # the outcome is known
                signal.signal(signal.SIGINT, end_at_once)
    except _EndedError as e:  # while that was being found out
        status = _ended(e)
    sys.exit(status)


def _run() -> int:
    """Run the command, and return its exit status."""
    try:
        try:
            with protected():
                app()
        finally:
            sys.stdout.flush()  # here, where a full disk is still an error
    except SystemExit as e:  # how typer ends every command
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except RamggufError as e:
        return _failed(str(e))
    except (_EndedError, KeyboardInterrupt) as e:
        return _ended(e)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except MemoryError:
        return _failed("out of memory; fewer --threads take less")
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        return _failed(f"{where}{e.strerror or e}")
    return 0


def _ended(e: BaseException) -> int:
    number = e.number if isinstance(e, _EndedError) else signal.SIGINT
    how = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    with contextlib.suppress(OSError):
        print(f"{how}; no file was left half-written", file=sys.stderr)
    return 128 + number


def _failed(message: str) -> int:
    with contextlib.suppress(OSError):
        print(f"error: {printable(message)}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return 1
    # What is left in the buffer cannot be written; Python would say so once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1
