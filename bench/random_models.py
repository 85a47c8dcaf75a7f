"""Models of well-known shapes with random weights, as large as the disk: input for timings.

    python bench/random_models.py llama-1B out.gguf

The weights are BF16: Gaussian, an eighth of them Student-t with four degrees of freedom, in
stretches of 4096 that are scaled log-normally; no two tensors are alike. A file is written front to
back, in constant memory.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

N_CONTEXT = 4096
_BLOCK = 1 << 24  # weights that are drawn; tensors are stretches of them, shifted and scaled
_STRETCH = 1 << 12  # of one distribution and scale


@dataclass(frozen=True)
class Shape:
    """What a model's size depends on; n_experts 0 makes a llama, else a qwen3moe.

    n_slices cuts every matrix of a layer, or only those of experts where there are any, into that
    many tensors, as checkpoints have it in which each expert is a tensor of its own; llama.cpp does
    not load those.
    """

    n_layers: int
    width: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head: int
    n_vocab: int
    n_experts: int = 0
    n_slices: int = 1
    is_tied: bool = False  # the head is the embedding


SHAPES: Mapping[str, Shape] = {
    "qwen2-1.5B": Shape(28, 1536, 8960, 12, 2, 128, 151936, is_tied=True),
    "llama-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "llama-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen3moe-30B": Shape(48, 2048, 768, 32, 4, 128, 151936, n_experts=128),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes, in numpy's order: row length last."""
    width, head = shape.width, shape.head
    yield "token_embd.weight", (shape.n_vocab, width)
    for i in range(shape.n_layers):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,),
            "attn_q": (shape.n_heads * head, width),
            "attn_k": (shape.n_kv_heads * head, width),
            "attn_v": (shape.n_kv_heads * head, width),
            "attn_output": (width, shape.n_heads * head),
            "ffn_norm": (width,),
        }
        if shape.n_experts:
            parts["attn_q_norm"] = parts["attn_k_norm"] = (head,)
            parts["ffn_gate_inp"] = (shape.n_experts, width)
        experts, suffix = ((shape.n_experts,), "_exps") if shape.n_experts else ((), "")
        parts[f"ffn_gate{suffix}"] = parts[f"ffn_up{suffix}"] = (*experts, shape.ffn, width)
        parts[f"ffn_down{suffix}"] = (*experts, width, shape.ffn)
        for name, dims in parts.items():
            whole = len(dims) == 1 or (shape.n_experts and not name.endswith("_exps"))
            if whole or shape.n_slices == 1:
                yield f"blk.{i}.{name}.weight", dims
                continue
            n = dims[0] // shape.n_slices
            for k in range(shape.n_slices):
                sliced = dims[1:] if shape.n_experts and n == 1 else (n, *dims[1:])
                yield f"blk.{i}.{name}.{k}.weight", sliced
    yield "output_norm.weight", (width,)
    if not shape.is_tied:
        yield "output.weight", (shape.n_vocab, width)


def n_weights(shape: Shape) -> int:
    """Return the weights of all tensors."""
    return sum(math.prod(dims) for _, dims in tensors(shape))


def cut(shape: Shape, n_bytes: int) -> Shape:
    """Return the shape with as many layers as a BF16 file of n_bytes holds, at least one."""
    outside = n_weights(replace(shape, n_layers=0))
    layer = n_weights(replace(shape, n_layers=1)) - outside
    return replace(shape, n_layers=max(1, (n_bytes // 2 - outside) // layer))


def write(path: Path, shape: Shape, seed: int = 0, tokenizer: Path | None = None) -> Path:
    """Write the model and return its path; it has the tokenizer of that GGUF file, or none."""
    out = GGUFWriter(path, "qwen3moe" if shape.n_experts else "llama")
    _describe(out, shape)
    if tokenizer is None:
        out.add_tokenizer_model("none")
    else:
        _copy_tokenizer(out, tokenizer)
    for name, dims in tensors(shape):
        is_matrix = len(dims) > 1
        kind = GGMLQuantizationType.BF16 if is_matrix else GGMLQuantizationType.F32
        n_bytes = math.prod(dims) * (2 if is_matrix else 4)
        out.add_tensor_info(name, dims, np.dtype(np.float32), n_bytes, kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    assert out.fout is not None
    rng = np.random.default_rng(seed)
    weights = _Weights(rng)
    for file in out.fout:
        out.write_padding(file, file.tell())
        for _, dims in tensors(shape):
            if len(dims) == 1:
                file.write(1 + 0.1 * rng.standard_normal(dims, np.float32))
            else:
                for rows in weights.matrix(math.prod(dims[:-1]), dims[-1]):
                    file.write(rows)
            out.write_padding(file, file.tell())
    out.close()
    return path


def _describe(out: GGUFWriter, shape: Shape) -> None:
    out.add_name("random weights")
    out.add_context_length(N_CONTEXT)
    out.add_embedding_length(shape.width)
    out.add_feed_forward_length(shape.ffn)
    out.add_block_count(shape.n_layers)
    out.add_head_count(shape.n_heads)
    out.add_head_count_kv(shape.n_kv_heads)
    out.add_rope_dimension_count(shape.head)
    out.add_key_length(shape.head)
    out.add_value_length(shape.head)
    out.add_layer_norm_rms_eps(1e-5)
    if shape.n_experts:
        out.add_expert_count(shape.n_experts)
        out.add_expert_used_count(8)
        out.add_expert_feed_forward_length(shape.ffn)
    out.add_vocab_size(shape.n_vocab)


def _copy_tokenizer(out: GGUFWriter, path: Path) -> None:
    for field in GGUFReader(path).fields.values():
        if field.name.startswith("tokenizer."):
            kind, element = field.types[0], field.types[-1]
            is_list = kind == GGUFValueType.ARRAY
            out.add_key_value(field.name, field.contents(), kind, element if is_list else None)


class _Weights:
    """Draws matrices: stretches of one large block of random numbers, from anywhere in it."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        block = rng.standard_normal((_BLOCK // _STRETCH, _STRETCH), np.float32)
        block[::8] = rng.standard_t(4, block[::8].shape) / math.sqrt(2)
        block *= rng.lognormal(0, 0.3, (len(block), 1)).astype(np.float32)
        # Adding half of the last place and cutting rounds to the nearest BF16.
        self._block = ((block.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).reshape(-1)

    def matrix(self, n_rows: int, row_length: int) -> Iterator[NDArray[np.uint16]]:
        """Yield the rows of a matrix in BF16, some at a time, scaled by a power of two."""
        step = max(1, _BLOCK // 4 // row_length)
        exponent = round(-0.5 * math.log2(row_length)) + int(self._rng.integers(-1, 2))
        scale = np.uint16((exponent << 7) & 0xFFFF)  # the exponent starts at the eighth bit
        for start in range(0, n_rows, step):
            n = min(step, n_rows - start) * row_length
            at = int(self._rng.integers(0, _BLOCK - n))
            yield self._block[at : at + n] + scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a GGUF file with a vocabulary of this size")
    parser.add_argument("--gb", type=float, help="cut the layers to a file of this size")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.gb:
        shape = cut(shape, int(arguments.gb * 1e9))
    write(arguments.path, shape, tokenizer=arguments.tokenizer)
    print(f"{arguments.path}: {shape}, {arguments.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
