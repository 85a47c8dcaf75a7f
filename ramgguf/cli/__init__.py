"""The command line: `ramgguf VERB …`."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from ramgguf.cli.app import main as run  # Ctrl-C may come while this is imported
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()
