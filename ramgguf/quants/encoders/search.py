"""Least squares: scales and levels of a block are searched for the least (weighted) error."""

from ramgguf.quants.encoders.encoder import Encoder

ENCODER = Encoder("search", "least squares", kernel="search")
