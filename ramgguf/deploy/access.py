"""Who may ask a server: the key, hosts and origins, in the form that requests have them.

A value that no request can match locks everybody out, and says so only to them: it is refused here.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from ramgguf.core.errors import EngineError

_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_DEFAULT_PORTS = {"http": 80, "https": 443}


def normal_key(text: str) -> str:
    """Return the key without the white space around it. Raises EngineError if no header has it."""
    key = text.strip()
    if not key:
        raise EngineError("the key of --api-key or RAMGGUF_API_KEY is empty; give one, or none")
    if not (key.isascii() and key.isprintable()):
        raise EngineError(
            "the key of --api-key or RAMGGUF_API_KEY has characters that no header has; "
            "give printable ASCII"
        )
    return key


def normal_host(text: str) -> str:
    """Return a host as a Host header has it, without a port: a name, an address, *.NAME or *.

    Raises EngineError for what is none of these.
    """
    host = text.strip().lower()
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        if host == "*" or _NAME.fullmatch(host):
            return host
        raise EngineError(
            f"--allow-host {text!r} is no host; give a name or an address without scheme and port, "
            "*.example.org, or * for any"
        ) from None
    return f"[{address}]" if address.version == 6 else str(address)


def normal_origin(text: str) -> str:
    """Return an origin as browsers send it: scheme://host, a port that is not the scheme's; or *.

    Raises EngineError for what is none.
    """
    origin = text.strip().lower()
    if origin in ("*", "null"):
        return origin
    try:
        parts = urlsplit(origin)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    surplus = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if not (parts.scheme and host and host.isascii()) or surplus or "*" in host:
        raise EngineError(
            f"--allow-origin {text!r} is no origin; give https://example.org, with a port where "
            "the page has one, or * for any"
        )
    shown = f"[{host}]" if ":" in host else host
    is_default = port is None or port == _DEFAULT_PORTS.get(parts.scheme)
    return f"{parts.scheme}://{shown}" + ("" if is_default else f":{port}")
