"""From a plan's cost to the KLD and perplexity it is expected to have, and how surely.

The numbers are from whole plans of one network that were run; docs/allocation.md has them and their
limits. What they say of another network is a guess, and every prediction names its source.
"""

import math
from dataclasses import dataclass

from ramgguf.core.documents import FrozenModel, NonNegativeFloat, PositiveFloat

# Two-sided 95 % of a normal distribution.
Z = 1.96


class Prediction(FrozenModel):
    """KLD in nats per token and PPL as a ratio to the source's, each with a 95 % interval."""

    kld: PositiveFloat
    kld_low: NonNegativeFloat
    kld_high: PositiveFloat
    ppl_ratio: PositiveFloat
    ppl_ratio_low: PositiveFloat
    ppl_ratio_high: PositiveFloat


@dataclass(frozen=True)
class Calibration:
    """How plans of an objective turned out: KLD ≈ factor · cost · e^(± spread) + kernels.

    kernels is what the formats' kernels add by rounding activations, in nats, with its standard
    deviation; ln(PPL ratio) ≈ slope · KLD, give or take slope_spread · KLD.
    """

    factor: float
    spread: float
    source: str
    kernels: float = 0.004
    kernels_spread: float = 0.002
    slope: float = 0.92
    slope_spread: float = 0.06


CALIBRATIONS = {
    "sensitivity": Calibration(
        factor=0.90,
        spread=0.10,
        source="measured sensitivities; interval: their sampling error, and how far Σ α·NMSE was "
        "from whole plans on one network (smol768)",
    ),
    "weighted": Calibration(
        factor=1.06 * 0.095e-6,
        spread=0.7,
        source="priors told by role and depth, fitted on one network (smol768); interval: how far "
        "single tensors' sensitivities are from them there; on other networks it was not measured",
    ),
}


def source(objective: str) -> str | None:
    """Return what predictions from costs of this objective rest on; None if there are none."""
    calibration = CALIBRATIONS.get(objective)
    return None if calibration is None else calibration.source


def predict(objective: str, cost: float, cost_error: float | None) -> Prediction | None:
    """Return what a plan of this cost is expected to do; None for objectives never calibrated.

    cost_error is the standard error of the cost, where it is known.
    """
    known = CALIBRATIONS.get(objective)
    if known is None:
        return None
    relative = cost_error / cost if cost_error is not None and cost > 0 else 0.0
    weights = known.factor * cost
    factor = math.exp(Z * math.hypot(known.spread, relative))
    # The two parts err independently; the kernels' is small, and never below zero.
    kld = weights + known.kernels
    low = kld - math.hypot(weights * (1 - 1 / factor), Z * known.kernels_spread)
    high = kld + math.hypot(weights * (factor - 1), Z * known.kernels_spread)
    low = max(0.0, low)
    return Prediction(
        kld=kld,
        kld_low=low,
        kld_high=high,
        ppl_ratio=_exp(known.slope * kld),
        ppl_ratio_low=_exp((known.slope - Z * known.slope_spread) * low),
        ppl_ratio_high=_exp((known.slope + Z * known.slope_spread) * high),
    )


def _exp(x: float) -> float:
    return math.exp(min(x, 200.0))  # of no use long before, and no number beyond 709
