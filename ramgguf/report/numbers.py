"""Numbers as people read them in tables and sentences."""

import math

from ramgguf.uncertainty import Estimate


def ppl(value: float) -> str:
    """Return a perplexity: 8.706, 123.4, 25,000, 1.2e+09."""
    if not math.isfinite(value):
        return "∞"
    if abs(value) < 100:
        return f"{value:.3f}"
    if abs(value) < 1000:
        return f"{value:.1f}"
    return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"


def kld(value: float) -> str:
    """Return a divergence in nats with three significant digits: 0.0123."""
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:.2e}"


def percent(value: float) -> str:
    """Return a percentage with two decimals: 97.31 %."""
    return f"{value:.2f} %"


def p_value(p: float) -> str:
    """Return a p-value: 0.03, 0.0004."""
    return f"{p:.2g}"


def interval(found: Estimate, number: str = "ppl") -> str:
    """Return the 95 % interval as low–high; empty where none is claimed. number: ppl or kld."""
    if found.low is None or found.high is None:
        return ""
    write = kld if number == "kld" else ppl
    return f"{write(found.low)}–{write(found.high)}"
