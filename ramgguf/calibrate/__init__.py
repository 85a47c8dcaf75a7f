"""Calibrate: importance matrices and Hessians, from the inputs of a model's weights."""

from ramgguf.calibrate.activations import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
