"""Transform: column scales that leave what a model computes, and help blocks to round it."""

from ramgguf.transform.scaling import (
    CHECK_CTX,
    EXACT,
    STRENGTH,
    Transformed,
    can_scale,
    departure,
    most_checks,
    transform,
)

__all__ = [
    "CHECK_CTX",
    "EXACT",
    "STRENGTH",
    "Transformed",
    "can_scale",
    "departure",
    "most_checks",
    "transform",
]
