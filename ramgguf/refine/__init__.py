"""Refine: swaps of formats, tried by forward passes."""

from ramgguf.refine.swaps import refine, refinement_journal

__all__ = ["refine", "refinement_journal"]
