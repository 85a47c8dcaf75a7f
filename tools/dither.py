"""Make a source of high precision from a quantized model, with columns as they were trained.

Weights of a quantized file lie on a grid, which flatters formats that have the same. Here each gets
uniform noise as wide as the step of its block of 32, so that nothing is left of the grid, and F16
weights. That is another network, nearly as good: what is made of it is compared with it, and not
with the model that it comes from. Unlike the models of real_models.py, whose channels are rescaled
at random, it can tell what scales are worth (`ramgguf transform`).

usage: python tools/dither.py QUANTIZED.gguf OUT.gguf
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

BLOCK = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}
NOT_COPIED = (
    "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture",
    "general.file_type", "general.quantization_version",
)  # fmt: skip


def dither(source: Path, output: Path, seed: int = 3) -> None:
    """Write the dithered model. Raises KeyError for formats that are not in BITS."""
    reader, rng = GGUFReader(source), np.random.default_rng(seed)
    out = GGUFWriter(output, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name not in NOT_COPIED:
            kind = field.types[0]
            of = field.types[-1] if kind == GGUFValueType.ARRAY else None
            out.add_key_value(field.name, field.contents(), kind, sub_type=of)
    out.add_file_type(LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            out.add_tensor(tensor.name, np.array(tensor.data))
            continue
        weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        blocks = weights.reshape(-1, BLOCK)
        n_steps = 2 ** BITS[tensor.tensor_type.name] - 1
        step = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / n_steps
        blocks += rng.uniform(-0.5, 0.5, blocks.shape).astype(np.float32) * step
        out.add_tensor(tensor.name, weights.astype(np.float16))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    dither(Path(sys.argv[1]), Path(sys.argv[2]))
