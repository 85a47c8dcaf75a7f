"""Formats for the tensors on which a model's first token depends, for a small share of the bytes.

A tensor whose error drowns the first token (sensitivity/massive.py) hardly shows in the mean over
a window of text, and plans do not see it. It gets a format whose error is too small to matter.
"""

import re
from collections.abc import Sequence

from ramgguf.plan.result import Assignment, Pin, Plan
from ramgguf.quants import formats
from ramgguf.sensitivity import FirstTokenReading, MassiveActivations

MOST_BYTES = 0.02  # of the planned file
LEAST_KLD = 0.01  # nats at the first token, below which a tensor needs no protection
ENOUGH_KLD = 0.03  # nats that a protected tensor may be expected to leave at the first token
LADDER = ("Q5_0", "Q5_K", "Q6_K", "Q8_0")
APART = 2.0  # times the KLD of later tokens: what costs these as well is the plan's own matter


def protected_formats(
    found: MassiveActivations,
    plan: Plan,
    *,
    allowed: Sequence[str] | None = None,
    pinned: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return pins for the tensors that first tokens need, most KLD per byte first.

    A tensor's KLD is taken to be in proportion to its error in the plan, and that to fall by a
    factor of 4 with each bit: it gets the smallest format that is enough. allowed are the formats
    to choose from (None: LADDER); tensors of the user's own pins are left to these.
    """
    taken = [Pin.parse(pin) for pin in pinned]
    room = MOST_BYTES * plan.n_bytes
    planned = {a.name: a for a in plan.assignments}
    gains = []
    for reading in found.readings:
        now = planned.get(reading.name)
        if now is None or any(re.search(pin.pattern, now.name) for pin in taken):
            continue
        kld = _first_kld(reading, now)
        if kld < LEAST_KLD or reading.kld_first < APART * reading.kld_later:
            continue
        larger = _larger(reading, now, allowed or LADDER)
        if not larger:
            continue
        extra, name = next(
            ((n, f) for n, f in larger if kld * 4.0 ** (-8 * n / now.n_weights) <= ENOUGH_KLD),
            larger[-1],
        )
        gains.append((kld / extra, extra, now.name, name))
    pins = []
    for _, extra, tensor, name in sorted(gains, reverse=True):
        if extra <= room:
            room -= extra
            pins.append(f"^{re.escape(tensor)}$={name}")
    return tuple(pins)


def _first_kld(reading: FirstTokenReading, now: Assignment) -> float:
    return reading.kld_first * now.nmse / reading.nmse if reading.nmse > 0 else 0.0


def _larger(
    reading: FirstTokenReading, now: Assignment, names: Sequence[str]
) -> list[tuple[int, str]]:
    """Return the formats that suit the tensor and take more bytes than now, and how many more."""
    n_rows = now.n_weights // reading.row_length
    found = [
        (n_rows * formats.row_bytes(name, reading.row_length) - now.n_bytes, name)
        for name in names
        if formats.suits(name, reading.row_length)
    ]
    return sorted((extra, name) for extra, name in found if extra > 0)
