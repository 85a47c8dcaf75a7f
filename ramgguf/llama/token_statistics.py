"""Statistics of values per token of decoded sequences."""

import math

import numpy as np
from numpy.typing import NDArray

BLOCK = 64  # tokens; neighbours are not independent, blocks nearly are


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean, from means of blocks of BLOCK neighbours."""
    n_blocks = max(2, len(values) // BLOCK)
    means = np.array([part.mean() for part in np.array_split(values, n_blocks)])
    return float(means.std(ddof=1) / math.sqrt(n_blocks))
