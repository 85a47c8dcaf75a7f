"""Sensitivity: how much the error of each tensor changes the model's output."""

from ramgguf.sensitivity.alpha import is_probed, sensitivity
from ramgguf.sensitivity.massive import FirstTokenReading, MassiveActivations, massive_activations
from ramgguf.sensitivity.readings import probe_format
from ramgguf.sensitivity.result import Sensitivity
from ramgguf.sensitivity.reweighing import reweigh

__all__ = [
    "FirstTokenReading",
    "MassiveActivations",
    "Sensitivity",
    "is_probed",
    "massive_activations",
    "probe_format",
    "reweigh",
    "sensitivity",
]
