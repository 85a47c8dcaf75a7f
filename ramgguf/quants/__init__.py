"""Formats, encoders, measuring and encoding of row blocks, importance matrices, Hessians."""
