"""Quantize: from a model and a limit to the file."""

from ramgguf.quantize.effort import EFFORTS, Effort, quantize
from ramgguf.quantize.output_paths import default_output
from ramgguf.quantize.perturb import perturb
from ramgguf.quantize.pipeline import Quantized

__all__ = ["EFFORTS", "Effort", "Quantized", "default_output", "perturb", "quantize"]
