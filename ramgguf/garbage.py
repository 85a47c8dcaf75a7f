"""Making many values at once without the garbage collector looking them all over."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Have cyclic garbage collected later: for code that makes many values and no cycles.

    The collector looks at new values again and again, which takes longer than making them. What is
    alive at the end counts as old: it is only looked at when everything is.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if gc.get_freeze_count() == 0:  # what somebody froze is to stay so
                gc.freeze()
                gc.unfreeze()
            gc.enable()
