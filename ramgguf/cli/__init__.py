"""The command line: `ramgguf VERB …`."""

from ramgguf.cli.app import main

__all__ = ["main"]
