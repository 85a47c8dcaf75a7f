"""Measure: every tensor's rate–distortion curve."""

from ramgguf.measure.rate_distortion import measure, measure_file
from ramgguf.measure.result import Measurement, Point, TensorMeasurement

__all__ = ["Measurement", "Point", "TensorMeasurement", "measure", "measure_file"]
