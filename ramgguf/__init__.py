"""Fit a GGUF language model to a byte budget: measure, plan, quantize, evaluate.

>>> import ramgguf
>>> made = ramgguf.quantize("model-f16.gguf", budget="16GB")
"""

import sys
from types import ModuleType

from ramgguf.core.drawing import drawn_by as _drawn_by
from ramgguf.core.version import __version__

TYPE_CHECKING = False  # typing's; the command line starts here, with as few imports as can be
if TYPE_CHECKING:
    from ramgguf.calibrate import calibrate
    from ramgguf.deploy import MemoryLimit, MemoryRequest, check
    from ramgguf.evaluate import compare, evaluate, tasks, trajectories
    from ramgguf.measure import measure
    from ramgguf.plan import ByteLimit, SizeLimit, curve, diff, explain, follow, plan
    from ramgguf.quantize import Quantized, default_output, quantize
    from ramgguf.quantize.perturb import perturb
    from ramgguf.refine import refine
    from ramgguf.sensitivity import reweigh, sensitivity
    from ramgguf.transform import transform

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
    "transform",
]


_PACKAGES = {
    "calibrate": ("calibrate",),
    "deploy": ("MemoryLimit", "MemoryRequest", "check"),
    "evaluate": ("compare", "evaluate", "tasks", "trajectories"),
    "measure": ("measure",),
    "plan": ("ByteLimit", "SizeLimit", "curve", "diff", "explain", "follow", "plan"),
    "quantize": ("Quantized", "default_output", "perturb", "quantize"),
    "refine": ("refine",),
    "sensitivity": ("reweigh", "sensitivity"),
    "transform": ("transform",),
}
_HOMES = {name: package for package, names in _PACKAGES.items() for name in names}


class _Front(ModuleType):
    """This module: what it exports is imported when it is first used.

    The command line starts here, too, and must be able to say that Ctrl-C interrupted the imports.
    """

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from importlib import import_module

        found: object = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the package ramgguf.plan would put it where the function plan is.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Front


def _draw(value: object) -> str | None:
    from ramgguf.report.notebook import drawing  # when a notebook asks, not before

    return drawing(value)


_drawn_by(_draw)
