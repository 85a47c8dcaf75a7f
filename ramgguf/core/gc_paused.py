"""Make many values at once without the garbage collector scanning them."""

import contextlib
import gc
from collections.abc import Iterator

MANY = 10_000  # scanning that many values takes milliseconds


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Put off collecting cyclic garbage: for code that makes many values and no cycles.

    The collector scans new values again and again, which takes longer than making them. If MANY
    were made, all that is alive at the end counts as old: only a full collection scans it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            # Objects that the caller froze stay frozen.
            if gc.get_count()[0] >= MANY and gc.get_freeze_count() == 0:
                gc.freeze()
                gc.unfreeze()
            gc.enable()
