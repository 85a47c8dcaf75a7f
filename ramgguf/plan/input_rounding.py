"""What llama.cpp's kernels lose beside the format: they round the inputs of quantized weights.

On a CPU, inputs are rounded to 8 bits, by the largest of a block: of 32 inputs for formats with
blocks of up to 128 weights, of 256 for those with blocks of 256 (K formats, points, TQ). What that
makes of an output is what an NMSE of the weights of the same size makes: Σ(x − x̂)² / Σx². It hardly
differs between models, but much between roles, for outliers decide it (docs/allocation.md, made by
bench/input_rounding.py).
"""

from collections.abc import Mapping
from types import MappingProxyType

from ramgguf.measure.result import Point, TensorMeasurement
from ramgguf.quants import formats

# By role, in blocks of 32 and of 256.
_BY_ROLE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "attn_q": (8e-5, 5e-4),
        "attn_k": (8e-5, 5e-4),
        "attn_v": (8e-5, 5e-4),
        "attn_qkv": (8e-5, 5e-4),
        "attn_output": (4e-5, 1e-4),
        "ffn_gate": (5e-5, 2.3e-4),
        "ffn_up": (5e-5, 2.3e-4),
        "ffn_gate_up": (5e-5, 2.3e-4),
        "ffn_down": (7.5e-5, 3.1e-4),
        "head": (9e-5, 6.7e-4),
        "tied_embedding": (9e-5, 6.7e-4),
        "embedding": (0.0, 0.0),  # looked up, not multiplied
    }
)
_OTHERS = (7e-5, 3e-4)
_LARGE_BLOCK = 256


def rounding_nmse(role: str, format_name: str) -> float:
    """Return the NMSE of the weights that rounding the inputs of a matrix comes to."""
    if format_name in formats.FLOAT_FORMATS:
        return 0.0
    of_32, of_256 = _BY_ROLE.get(role.removesuffix("_shexp").removesuffix("_exps"), _OTHERS)
    return of_256 if formats.get(format_name).block_size == _LARGE_BLOCK else of_32


def added_nmse(tensor: TensorMeasurement, point: Point) -> float:
    """Return what rounding inputs adds to the point's NMSE.

    Nothing where the format holds the weights exactly: they are kept at its bytes.
    """
    if point.unweighted == 0 or point.format == tensor.grid:
        return 0.0
    return rounding_nmse(tensor.role, point.format)
