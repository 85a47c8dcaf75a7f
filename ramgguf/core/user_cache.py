"""Where what is made once for a user is kept: $XDG_CACHE_HOME/ramgguf, by default ~/.cache/ramgguf.

Everything there can be made again; a user may remove it at any time.
"""

import os
from pathlib import Path


def user_cache(kind: str) -> Path:
    """Return the folder for one kind of things; it is not made."""
    # The XDG specification: a relative path is to be ignored.
    said = Path(os.environ.get("XDG_CACHE_HOME") or "~")
    base = said if said.is_absolute() else Path.home() / ".cache"
    return base / "ramgguf" / kind
