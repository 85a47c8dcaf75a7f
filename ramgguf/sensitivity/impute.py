"""From readings of some tensors to an α for every one: shrink, carry or interpolate, never trust a
zero.

All is done per weight and in logarithms: α spans three decades within one model, and its errors
are relative.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.sensitivity.result import LayerReading, Origin, Reading, TensorSensitivity

# Interpolation between two layers is off by about as much as neighbours differ; a role's median
# says little more than the order of magnitude.
INTERPOLATED_ERROR = 0.5
# Of α from 512 tokens, beside a factor that all tensors share: bench/carried_alpha.py.
READ_ERROR = 0.15
# What carrying adds to that: 0.10 on smol135, 0.21 on qwen05.
CARRIED_ERROR = 0.15
ROLE_ERROR = 1.0


@dataclass(frozen=True)
class Member:
    """A tensor that needs an α."""

    name: str
    role: str
    layer: int | None
    n_weights: int


@dataclass(frozen=True)
class _Known:
    """A tensor's logarithm of α per weight, and the standard error of that."""

    log: float
    error: float


def impute(
    members: Sequence[Member],
    readings: Mapping[str, Reading],
    layer_readings: Mapping[str, LayerReading] = MappingProxyType({}),
) -> tuple[TensorSensitivity, ...]:
    """Return an α for every member, from the readings of some.

    Where a member has a layer reading only, the KLD per error of its role's members that have both
    is interpolated between their layers.

    Raises EngineError when no reading is positive: then nothing that was replaced had any effect.
    """
    if readings and all(r.nmse == 0 for r in readings.values()):
        found = ", ".join(sorted({r.format for r in readings.values()}))
        raise EngineError(
            f"all weights lie on the grid of {found}, in which they were probed: nothing changed, "
            "so no sensitivity can be read; a file of these formats loses nothing"
        )
    if not any(r.kld > 0 and r.nmse > 0 for r in readings.values()):
        raise EngineError(
            "no tensor's quantization changed the model's output; "
            "llama.cpp did not read the copy that was changed: please report it"
        )
    filled: dict[str, TensorSensitivity] = {}
    everything = _shrunk(members, readings)
    fallback = float(np.median([k.log for k in everything.values()]))
    for role in dict.fromkeys(m.role for m in members):
        of_role = [m for m in members if m.role == role]
        known = _shrunk(of_role, readings)
        logs = [k.log for k in known.values()]
        median = float(np.median(logs)) if logs else fallback
        for member in of_role:
            filled[member.name] = _one(
                member, known, of_role, median, readings.get(member.name), layer_readings
            )
    return tuple(filled[m.name] for m in members)


def _shrunk(members: Sequence[Member], readings: Mapping[str, Reading]) -> dict[str, _Known]:
    """Return the role's readings drawn to their median, each by its own error (empirical Bayes).

    The spread that the errors do not explain is the role's own; a reading whose error is as large
    as that spread is moved half the way to the median.
    """
    known: dict[str, _Known] = {}
    for m in members:
        reading = readings.get(m.name)
        if reading is not None and reading.kld > 0 and reading.nmse > 0:
            relative = min(ROLE_ERROR, reading.standard_error / reading.kld)
            known[m.name] = _Known(math.log(reading.alpha / m.n_weights), relative)
    if len(known) < 3:
        return known
    logs = np.array([k.log for k in known.values()])
    errors = np.array([k.error for k in known.values()])
    median = float(np.median(logs))
    # A robust spread: a few layers stand far out, and must not widen it for all others.
    spread = 1.4826 * float(np.median(np.abs(logs - median)))
    own = max(spread**2 - float(np.mean(errors**2)), 0.0)
    return {name: _Known(*_drawn(k, median, own)) for name, k in known.items()}


def _drawn(known: _Known, median: float, own: float) -> tuple[float, float]:
    noise = known.error**2
    if noise == 0:
        return known.log, 0.0
    distance = (known.log - median) ** 2
    own = max(own, distance - noise)  # further out than its error: not noise
    if own <= 0:
        return median, known.error
    weight = own / (own + noise)
    return median + weight * (known.log - median), known.error * math.sqrt(weight)


def _one(
    member: Member,
    known: Mapping[str, _Known],
    of_role: Sequence[Member],
    median: float,
    reading: Reading | None,
    layer_readings: Mapping[str, LayerReading],
) -> TensorSensitivity:
    origin: Origin
    if member.name in known:
        value, origin = known[member.name], "measured"
    elif reading is not None:
        value, origin = _Known(median, ROLE_ERROR), "idle"
    elif carried := _carried(member, known, of_role, layer_readings):
        value, origin = carried, "carried"
    elif between := _between(member, known, of_role):
        value, origin = _Known(between.log, INTERPOLATED_ERROR), "interpolated"
    else:
        value, origin = _Known(median, ROLE_ERROR), "role"
    return TensorSensitivity(
        name=member.name,
        role=member.role,
        layer=member.layer,
        n_weights=member.n_weights,
        alpha=math.exp(value.log) * member.n_weights,
        relative_error=value.error,
        origin=origin,
        reading=reading,
        layer_reading=layer_readings.get(member.name),
    )


def _carried(
    member: Member,
    known: Mapping[str, _Known],
    of_role: Sequence[Member],
    layer_readings: Mapping[str, LayerReading],
) -> _Known | None:
    """Return the value by the member's layer reading, if it and layers on either side have one."""
    errors = {
        m.name: math.log(r.error / r.nmse / m.n_weights)
        for m in of_role
        if (r := layer_readings.get(m.name)) is not None and r.error > 0 and r.nmse > 0
    }
    if member.name not in errors:
        return None
    per_error = {
        name: _Known(known[name].log - log, known[name].error)
        for name, log in errors.items()
        if name in known
    }
    between = _between(member, per_error, of_role)
    if between is None:
        return None
    return _Known(between.log + errors[member.name], math.hypot(CARRIED_ERROR, between.error))


def _between(
    member: Member, known: Mapping[str, _Known], of_role: Sequence[Member]
) -> _Known | None:
    """Return the value on the line between the nearest read layers on either side, if any, with the
    mean of their errors.
    """
    if member.layer is None:
        return None
    layers = sorted(
        ((m.layer, known[m.name]) for m in of_role if m.layer is not None and m.name in known),
        key=lambda pair: pair[0],
    )
    for (low, at_low), (high, at_high) in itertools.pairwise(layers):
        if low < member.layer < high:
            share = (member.layer - low) / (high - low)
            log = at_low.log + share * (at_high.log - at_low.log)
            return _Known(log, (at_low.error + at_high.error) / 2)
    return None
