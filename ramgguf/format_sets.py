"""Names for sets of formats, to be used wherever formats are listed."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

# cpu-fast, from bench/results/format_speed.jsonl: at a prompt at least 75 % as fast as the fastest
# format, and at generation at least 85 % as fast as the fastest of no fewer bits per weight.
SETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu-fast": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "IQ4_NL"),
        "k": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        "linear": (
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
            *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        ),
    }
)


def expand(names: Iterable[str]) -> tuple[str, ...]:
    """Return the formats in upper case, each set in its formats' place, none twice."""
    found: dict[str, None] = {}
    for name in names:
        for member in SETS.get(name.lower(), (name.upper(),)):
            found[member] = None
    return tuple(found)
