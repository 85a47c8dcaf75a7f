"""Making many values at once without the garbage collector looking them all over."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Have cyclic garbage collected later: for code that makes many values and no cycles.

    The collector looks at what was made again and again, which takes longer than making it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
