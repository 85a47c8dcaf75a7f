"""Coordinate descent: codes and scales changed in turn while that lowers the output's error.

QuantEase (Behdin et al. 2023, arXiv 2309.01885), from where error feedback ends, and for the
scales of ggml's blocks as well. The error is Σ eHeᵀ over the rows e of W − Q, with H damped as
for error feedback: without, rows fit the tokens of the Hessian and lose on others.
"""

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.quants.encoders import gptq
from ramgguf.quants.encoders.encoder import Encoder
from ramgguf.quants.hessian import Hessian

FORMATS = gptq.FORMATS
N_SWEEPS = 2  # over all columns: more cost three times what error feedback does, and gain little

Floats = NDArray[np.float32]


def encode(type_name: str, rows: Floats, hessian: Hessian, importance: Floats) -> NDArray[np.uint8]:
    """Return blocks of the rows, in a format of FORMATS; importance (columns) weighs scales.

    No row has a larger damped error than gptq gives it. Blocks of formats whose codes stand for
    several weights at once are those of gptq. Raises ValueError where a scale would overflow.
    """
    blocks = gptq.encode(type_name, rows, hessian, importance)
    if type_name not in gptq.SCALAR_FORMATS:
        return blocks
    weights = np.ascontiguousarray(rows, np.float32)
    _core.descend(type_name, weights, hessian.damped, blocks, N_SWEEPS)
    return blocks


ENCODER = Encoder(
    "descent",
    "error feedback, then coordinate descent (needs Hessians)",
    kernel="search",
    encode_output=encode,
    output_formats=FORMATS,
    plans_by="search",
)
