"""Fit a GGUF language model to a byte budget: measure, plan, quantize, evaluate.

>>> import ramgguf
>>> made = ramgguf.quantize("model-f16.gguf", budget="16GB")
"""

from ramgguf.api import Quantized, default_output, evaluate, measure, plan, quantize
from ramgguf.version import __version__

__all__ = [
    "Quantized",
    "__version__",
    "default_output",
    "evaluate",
    "measure",
    "plan",
    "quantize",
]
