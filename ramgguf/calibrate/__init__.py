"""Calibrate: importance matrices and Hessians, from what a model"s weights are multiplied with."""

from ramgguf.calibrate.activations import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
