"""The environment of children that tests interrupt."""

import os


def unwatched() -> dict[str, str]:
    """Return the environment without what makes coverage.py watch a child.

    It takes a lock of its own now and then; an interrupt in there has the child wait for itself.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith(("COVERAGE_", "COV_CORE"))}
