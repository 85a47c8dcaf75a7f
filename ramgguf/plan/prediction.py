"""The KLD that a plan is expected to have on text, with a 95 % interval.

KLD ≈ Σ α (NMSE + KERNEL_NMSE) over the tensors that are quantized, where α is of the tokens that
scores count (Sensitivity.late_shares). llama.cpp's kernels round activations to 8 bits, which errs
as an NMSE of the weights would; here it is taken to be the same in all formats, as when the figures
were fitted. What is left is taken to be lognormal: what α is uncertain by, and a spread between
models and texts.

docs/allocation.md has the plans of two families that the figures come from; fitted to either
family alone, the intervals hold on the other.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ramgguf.plan.result import Assignment, PredictedKLD
from ramgguf.quants.encoders import EncoderName

QUANTILE = 1.96
# Encoders whose plans the intervals were compared with; error feedback loses less than its NMSE.
ENCODERS: frozenset[EncoderName] = frozenset({"rtn", "search"})


@dataclass(frozen=True)
class Calibration:
    """How predictions compare with measured KLD: spread is the standard deviation of its log."""

    kernel_nmse: float
    spread: float


SHIPPED = Calibration(kernel_nmse=1.6e-4, spread=0.4)


def predicted_kld(
    assignments: Iterable[Assignment],
    alpha: Mapping[str, float],
    errors: Mapping[str, float],
    late: Mapping[str, float],
    encoder: EncoderName,
) -> PredictedKLD | None:
    """Return the KLD of a plan, in nats per token.

    alpha are the tensors' sensitivities, errors their relative standard errors, late the shares of
    them that scores count. None for an encoder that was not compared, and where no shares are
    known.
    """
    if encoder not in ENCODERS or not late:
        return None
    alpha_nmse = total = error = 0.0
    for a in assignments:
        if a.nmse > 0:
            counted = late.get(a.name, 1.0) * alpha.get(a.name, 0.0)
            alpha_nmse += counted * a.nmse
            total += counted
            error += counted * a.nmse * errors.get(a.name, 0.0)
    return interval(alpha_nmse, total, error)


def interval(
    alpha_nmse: float, alpha: float, error: float, calibration: Calibration = SHIPPED
) -> PredictedKLD | None:
    """Return the interval of sums over a plan's quantized tensors: Σ α · NMSE, Σ α.

    error is the standard error of Σ α · NMSE: all tensors were read with the same tokens, so their
    errors add up. None where nothing is lost.
    """
    if alpha_nmse <= 0:
        return None
    value = alpha_nmse + calibration.kernel_nmse * alpha
    spread = QUANTILE * math.hypot(calibration.spread, error / alpha_nmse)
    return PredictedKLD(kld=value, low=value * math.exp(-spread), high=value * math.exp(spread))
