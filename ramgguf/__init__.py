"""Fit a GGUF language model to a byte budget: measure, plan, quantize, evaluate.

>>> import ramgguf
>>> made = ramgguf.quantize("model-f16.gguf", budget="16GB")
"""

from ramgguf.api import (
    Quantized,
    calibrate,
    curve,
    default_output,
    diff,
    evaluate,
    explain,
    follow,
    measure,
    perturb,
    plan,
    plan_on,
    quantize,
    reweigh,
    sensitivity,
)
from ramgguf.api import refine_plan as refine
from ramgguf.documents import drawn_by as _drawn_by
from ramgguf.verdicts import check, compare
from ramgguf.version import __version__

__all__ = [
    "Quantized",
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
    "plan_on",
    "quantize",
    "refine",
    "reweigh",
    "sensitivity",
]


def _draw(value: object) -> str | None:
    from ramgguf.report.notebook import drawing  # when a notebook asks, not before

    return drawing(value)


_drawn_by(_draw)
