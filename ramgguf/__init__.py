"""Fit a GGUF language model to a byte budget: measure, plan, quantize, evaluate.

>>> import ramgguf
>>> made = ramgguf.quantize("model-f16.gguf", budget="16GB")
"""

from ramgguf.calibrate import calibrate
from ramgguf.core.documents import drawn_by as _drawn_by
from ramgguf.core.version import __version__
from ramgguf.deploy import MemoryLimit, MemoryRequest, check
from ramgguf.evaluate import compare, evaluate, tasks, trajectories
from ramgguf.measure import measure
from ramgguf.plan import ByteLimit, SizeLimit, curve, diff, explain, follow, plan
from ramgguf.quantize import Quantized, default_output, perturb, quantize
from ramgguf.refine import refine
from ramgguf.sensitivity import reweigh, sensitivity

__all__ = [
    "ByteLimit",
    "MemoryLimit",
    "MemoryRequest",
    "Quantized",
    "SizeLimit",
    "__version__",
    "calibrate",
    "check",
    "compare",
    "curve",
    "default_output",
    "diff",
    "evaluate",
    "explain",
    "follow",
    "measure",
    "perturb",
    "plan",
    "quantize",
    "refine",
    "reweigh",
    "sensitivity",
    "tasks",
    "trajectories",
]


def _draw(value: object) -> str | None:
    from ramgguf.report.notebook import drawing  # when a notebook asks, not before

    return drawing(value)


_drawn_by(_draw)
