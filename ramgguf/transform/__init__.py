"""Transform: scales in a model that leave what it computes, and help blocks to round it."""

from ramgguf.transform.scaling import Transformed, can_scale, transform

__all__ = ["Transformed", "can_scale", "transform"]
