"""Calibrate: importance matrices and Hessians, from the inputs of a model's weights."""

from ramgguf.calibrate.activations import N_SEQUENCES, Calibration, calibrate

__all__ = ["N_SEQUENCES", "Calibration", "calibrate"]
