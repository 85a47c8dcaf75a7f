"""Sizes as people write them, and as they read them."""

import re

from ramgguf.core.errors import BudgetError

MOST_BYTES = 2**53  # what JSON's numbers hold
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z%]*)")
_DECIMAL = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_MULTIPLIERS = {
    **_DECIMAL,
    **{f"{k}B": v for k, v in _DECIMAL.items() if k not in ("", "B")},
    **{f"{k}IB": 1024**i for i, k in enumerate("KMGT", start=1)},
}


def parse_budget(text: str, *, n_weights: int, n_bytes_source: int) -> int:
    """Return the bytes that a budget such as 16GB, 16GiB, 4.5bpw, 30% or 123456 stands for.

    `bpw` multiplies n_weights (all weights of the model), `%` the source file's bytes.
    Raises BudgetError when the text is none of these or the value is not positive.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match["unit"].upper() if match else ""
    if match and unit == "BPW":
        n_bytes = float(match["number"]) * n_weights / 8
    elif match and unit == "%":
        n_bytes = float(match["number"]) / 100 * n_bytes_source
    elif match and unit in _MULTIPLIERS:
        n_bytes = float(match["number"]) * _MULTIPLIERS[unit]
    else:
        raise BudgetError(
            f"budget {text!r} is not a size; write 16GB, 16GiB, 4.5bpw, 30% or a number of bytes"
        )
    if n_bytes < 1:
        raise BudgetError(f"budget {text!r} is {n_bytes:g} bytes; it must be positive")
    if n_bytes > MOST_BYTES:
        raise BudgetError(f"budget {text[:40]!r} is more than {float(MOST_BYTES):g} bytes")
    return int(n_bytes)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 5GB or 4GiB; raises BudgetError for anything else."""
    if text.strip().lower().endswith(("bpw", "%")):
        raise BudgetError(f"size {text!r} is relative; write 5GB, 4GiB or a number of bytes")
    match = _SIZE.fullmatch(text.strip())
    if match is None or match["unit"].upper() not in _MULTIPLIERS:
        raise BudgetError(f"size {text!r} is none; write 5GB, 4GiB or a number of bytes")
    return parse_budget(text, n_weights=0, n_bytes_source=0)


_TIME = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>s|m|min|h)?")
_SECONDS = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def parse_seconds(text: str) -> float:
    """Return the seconds of a time such as 90, 90s, 20m or 1.5h; raises BudgetError otherwise."""
    match = _TIME.fullmatch(text.strip().lower())
    seconds = float(match["number"]) * _SECONDS[match["unit"]] if match else 0.0
    if not 0 < seconds < 1e9:
        raise BudgetError(f"time {text!r} is none; write 90s, 20m or 1.5h")
    return seconds


def format_bytes(n_bytes: float) -> str:
    """Return bytes in powers of 1000, three significant digits: 104 MB, 15.8 GB."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(n_bytes) >= size:
            value = n_bytes / size
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}"
    return f"{n_bytes:.0f} B"


_PLURALS = {"matrix": "matrices", "pass": "passes"}  # of nouns that take more than an s


def format_count(n: float, noun: str, spec: str = "") -> str:
    """Return a number of things: '1 thread', '8 threads', with the spec ',' '1,280 tokens'."""
    before, _, last = noun.rpartition(" ")
    plural = f"{before} {_PLURALS.get(last, f'{last}s')}".strip()
    return f"{n:{spec}} {noun if n == 1 else plural}"


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
