"""The statistics that `llama-perplexity --kl-divergence` prints, from values per token.

Errors (±) are its own: standard errors as if all tokens were independent. They are too small, since
the tokens of an article are not; the other tables have intervals over articles. Source: llama.cpp,
tools/perplexity/perplexity.cpp, function kl_divergence.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ramgguf.core.documents import FrozenModel, NonNegativeFloat, Number, Positive

KLD_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)
DELTA_P_QUANTILES = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)
_MIN_TOKENS = 10  # as there

Floats = npt.NDArray[np.float64]


class Value(FrozenModel):
    """A value and its standard error."""

    value: Number
    error: NonNegativeFloat


class LlamaStatistics(FrozenModel):
    """PPL of model and base, KLD in nats, Δp and same top p as shares, over n tokens.

    kld_quantiles are at KLD_QUANTILES, delta_p_quantiles at DELTA_P_QUANTILES.
    """

    n: Positive
    ppl: Value
    ppl_base: Value
    correlation: Number | None
    ln_ratio: Value
    ratio: Value
    difference: Value
    kld: Value
    kld_quantiles: tuple[Number, ...]
    delta_p: Value
    delta_p_quantiles: tuple[Number, ...]
    rms_delta_p: Value
    same_top_p: Value

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield each statistic under the name that llama-perplexity gives it, written as there."""
        yield "Mean PPL(Q)", _plain(self.ppl)
        yield "Mean PPL(base)", _plain(self.ppl_base)
        if self.correlation is not None:
            yield "Cor(ln(PPL(Q)), ln(PPL(base)))", f"{100 * self.correlation:.2f}%"
        yield "Mean ln(PPL(Q)/PPL(base))", _plain(self.ln_ratio)
        yield "Mean PPL(Q)/PPL(base)", _plain(self.ratio)
        yield "Mean PPL(Q)-PPL(base)", _plain(self.difference)
        yield "Mean KLD", _plain(self.kld)
        for p, x in zip(KLD_QUANTILES, self.kld_quantiles, strict=True):
            yield f"{_quantile_name(p)} KLD", f"{x:.6f}"
        yield "Mean Δp", _percent(self.delta_p)
        for p, x in zip(DELTA_P_QUANTILES, self.delta_p_quantiles, strict=True):
            yield f"{_quantile_name(p)} Δp", f"{100 * x:.3f}%"
        yield "RMS Δp", _percent(self.rms_delta_p)
        yield "Same top p", _percent(self.same_top_p)


def _plain(x: Value) -> str:
    return f"{x.value:.6f} ± {x.error:.6f}"


def _percent(x: Value) -> str:
    return f"{100 * x.value:.3f} ± {100 * x.error:.3f} %"


def _quantile_name(p: float) -> str:
    return {1.0: "Maximum", 0.5: "Median", 0.0: "Minimum"}.get(p) or f"{100 * p:.1f}%"


def llama_statistics(
    nll: Sequence[npt.ArrayLike],
    nll_base: Sequence[npt.ArrayLike],
    kld: Sequence[npt.ArrayLike],
    n_same_top: int,
) -> LlamaStatistics | None:
    """Return the statistics of values per token, sequence by sequence, in nats; None below 10."""
    q, p, d = (
        np.concatenate([np.asarray(x, np.float64) for x in xs]) for xs in (nll, nll_base, kld)
    )
    n = len(q)
    if n < _MIN_TOKENS:
        return None
    mean_q, mean_p = _mean(q), _mean(p)
    covariance = float(np.mean(q * p) - mean_q.value * mean_p.value) / (n - 1)
    errors = mean_q.error * mean_p.error
    ppl, base = _exp(mean_q), _exp(mean_p)
    ln_ratio = _difference(mean_q, mean_p, covariance)
    delta = np.exp(-q) - np.exp(-p)
    squares = _mean(delta**2)
    rms = math.sqrt(squares.value)
    same = n_same_top / n
    return LlamaStatistics(
        n=n,
        ppl=ppl,
        ppl_base=base,
        correlation=covariance / errors if errors > 0 else None,
        ln_ratio=ln_ratio,
        ratio=_exp(ln_ratio),
        difference=_difference(ppl, base, covariance * ppl.value * base.value),
        kld=_mean(d),
        kld_quantiles=tuple(float(x) for x in np.quantile(d, KLD_QUANTILES)),
        delta_p=_mean(delta),
        delta_p_quantiles=tuple(float(x) for x in np.quantile(delta, DELTA_P_QUANTILES)),
        rms_delta_p=Value(value=rms, error=0.5 / rms * squares.error if rms > 0 else 0.0),
        same_top_p=Value(value=same, error=math.sqrt(same * (1 - same) / (n - 1))),
    )


def _mean(x: Floats) -> Value:
    return Value(value=float(x.mean()), error=float(x.std() / math.sqrt(len(x) - 1)))


def _exp(x: Value) -> Value:
    value = math.exp(min(x.value, 200.0))
    return Value(value=value, error=value * x.error)


def _difference(a: Value, b: Value, covariance: float) -> Value:
    variance = a.error**2 + b.error**2 - 2 * covariance
    return Value(value=a.value - b.value, error=math.sqrt(max(0.0, variance)))
