"""Numbers as people read them in tables and sentences."""

import math
from collections.abc import Callable

from ramgguf.evaluate.intervals import Estimate


def ppl(value: float) -> str:
    """Return a perplexity: 8.706, 123.4, 25,000, 1.2e+09."""
    if not math.isfinite(value):
        return "∞"
    if abs(value) < 100:
        return f"{value:.3f}"
    if abs(value) < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"


def short_ppl(value: float) -> str:
    """Return a perplexity where three digits are enough: 8.71, 25,000."""
    return f"{value:.2f}" if abs(value) < 100 else ppl(value)


def kld(value: float) -> str:
    """Return a divergence in nats with three significant digits: 0.0123, 4.56e-05."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def percent(value: float) -> str:
    """Return a percentage with two decimals: 97.31 %."""
    return f"{value:.2f} %"


def p_value(p: float) -> str:
    """Return a p-value with two significant digits: 0.034, 0.0004."""
    return f"{p:.2g}"


def with_interval(found: Estimate, write: Callable[[float], str]) -> str:
    """Return a value and its interval, if one is claimed: 8.706 (8.21–9.18)."""
    if found.low is None or found.high is None:
        return write(found.value)
    short = short_ppl if write is ppl else write
    low, high = (short(bound).removesuffix(" %") for bound in (found.low, found.high))
    dash = " to " if found.low < 0 else "–"
    return f"{write(found.value)} ({low}{dash}{high})"


def estimate_json(found: Estimate) -> dict[str, float | None]:
    """Return an estimate as JSON values; low and high are None where no interval is claimed."""
    return {"value": found.value, "low": found.low, "high": found.high}


def ratio(found: Estimate) -> str:
    """Return a ratio with its interval, if one is claimed: 0.72 (0.69–0.75), 1.0060 (…)."""
    digits = 2
    if found.low is not None and found.high is not None:
        while digits < 4 and found.high - found.low < 10 ** (1 - digits):
            digits += 1
    return with_interval(found, lambda x: f"{x:.{digits}f}")
