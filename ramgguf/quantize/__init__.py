"""Quantize: from a model and a limit to the file."""

from ramgguf.quantize.output_paths import default_output, free_output
from ramgguf.quantize.perturb import perturb
from ramgguf.quantize.pipeline import Quantized
from ramgguf.quantize.quantization import default_effort, quantize, seconds_to_score
from ramgguf.quantize.schedule import EFFORTS, Effort

__all__ = [
    "EFFORTS",
    "Effort",
    "Quantized",
    "default_effort",
    "default_output",
    "free_output",
    "perturb",
    "quantize",
    "seconds_to_score",
]
