"""Fit a GGUF language model to a byte budget: measure, plan, quantize, evaluate."""
