"""Round to nearest: scales from the extremes of a block, as the first step of ggml's encoders."""

from ramgguf.quants.encoders.encoder import Encoder

ENCODER = Encoder("rtn", "round to nearest", kernel="rtn")
