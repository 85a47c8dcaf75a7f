"""The command line: `ramgguf VERB …`."""

import os
import signal
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run the command line."""
    # Importing takes half a second, and an exception would come where Python or an extension
    # cannot pass it on. Nothing is open yet that had to be cleaned up.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, end_at_once)
    from ramgguf.cli.app import main as run

    run(is_interruptible=is_default)


def end_at_once(_number: int, _frame: FrameType | None) -> None:
    """End the process: what a signal does where nothing can be cleaned up."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
