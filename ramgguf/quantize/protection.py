"""Formats for the tensors on which a model's first token depends, for a small share of the bytes.

A tensor whose error drowns the first token (sensitivity/massive.py) hardly shows in the mean over
a window of text, and plans do not see it. It gets a format whose error is too small to matter.
"""

import re
from collections.abc import Sequence

from ramgguf.plan.result import Assignment, Pin, Plan
from ramgguf.quants import formats
from ramgguf.sensitivity import MassiveActivations
from ramgguf.sensitivity.massive import FirstTokenReading

MOST_BYTES = 0.02  # of the planned file
LEAST_KLD = 0.01  # nats at the first token, below which a tensor needs no protection
APART = 2.0  # times the KLD of later tokens: what costs these as well is the plan's own matter


def protected_formats(
    found: MassiveActivations,
    plan: Plan,
    *,
    allowed: Sequence[str] | None = None,
    pinned: Sequence[str] = (),
) -> tuple[str, ...]:
    """Return pins for the tensors that first tokens need, most KLD per byte first.

    A tensor's KLD is taken to be in proportion to its error in the plan. allowed are the formats
    to choose from (None: all); tensors of the user's own pins are left to these.
    """
    taken = [Pin.parse(pin) for pin in pinned]
    room = MOST_BYTES * plan.n_bytes
    planned = {a.name: a for a in plan.assignments}
    gains = []
    for reading in found.readings:
        now = planned.get(reading.name)
        if now is None or any(re.search(pin.pattern, now.name) for pin in taken):
            continue
        name = _least_error(reading, allowed)
        kld = _first_kld(reading, now)
        if name is None or kld < LEAST_KLD or reading.kld_first < APART * reading.kld_later:
            continue
        n_rows = now.n_weights // reading.row_length
        extra = n_rows * formats.row_bytes(name, reading.row_length) - now.n_bytes
        if extra > 0:
            gains.append((kld / extra, extra, now.name, name))
    pins = []
    for _, extra, tensor, name in sorted(gains, reverse=True):
        if extra <= room:
            room -= extra
            pins.append(f"^{re.escape(tensor)}$={name}")
    return tuple(pins)


def _first_kld(reading: FirstTokenReading, now: Assignment) -> float:
    return reading.kld_first * now.nmse / reading.nmse if reading.nmse > 0 else 0.0


def _least_error(reading: FirstTokenReading, allowed: Sequence[str] | None) -> str | None:
    """Return Q8_0, or the largest format that is allowed and suits the tensor's rows."""
    suiting = [f for f in allowed or ("Q8_0",) if formats.suits(f, reading.row_length)]
    return max(suiting, key=lambda f: formats.row_bytes(f, reading.row_length), default=None)
