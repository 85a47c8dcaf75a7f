"""Where what is made once for a user is kept: $XDG_CACHE_HOME/ramgguf, by default ~/.cache/ramgguf;
for a user without a home folder, in that for temporary files.

Everything there can be made again; a user may remove it at any time.
"""

import os
import tempfile
from pathlib import Path


def user_cache(kind: str) -> Path:
    """Return the folder for one kind of things; it is not made."""
    # The XDG specification: a relative path is to be ignored.
    said = Path(os.environ.get("XDG_CACHE_HOME") or "~")
    if said.is_absolute():
        return said / "ramgguf" / kind
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in containers
        return Path(tempfile.gettempdir()) / f"ramgguf-{os.getuid()}" / kind
    return home / ".cache" / "ramgguf" / kind
