"""LoRA adapters in GGUF, as llama.cpp's converter writes them, merged into a GGUF model.

The arithmetic is that of llama.cpp (src/llama-adapter.h, src/llama-graph.cpp): W + alpha / rank ·
B A, and W + B A where alpha is 0 or missing. Of an embedding the factors are turned: a row of A
for each token. Sums are taken in float64 and rounded once, to W's own type.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf import _core
from ramgguf.core.errors import CheckpointError, FormatError
from ramgguf.core.units import format_bytes, format_count
from ramgguf.gguf.architecture import TOKEN_EMBEDDING
from ramgguf.gguf.checkpoint import ADAPTER_CONFIG, file_sha256
from ramgguf.gguf.conversion import converted_folder
from ramgguf.gguf.header import ValueType, string
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.gguf.safetensors import from_float, to_float
from ramgguf.gguf.shards import model_stem
from ramgguf.gguf.writer import GGUFOutput

_A, _B = ".lora_a", ".lora_b"
_ALPHA = "adapter.lora.alpha"
_MERGED_KEY = "ramgguf.lora_sha256"
_STORED: Mapping[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_WEIGHTS_AT_ONCE = 1 << 22
Float64s = NDArray[np.float64]


@dataclass(frozen=True)
class _Factors:
    """What is added to a tensor: left (experts, rows, rank) times right (experts, rank, row length)
    times scale; one expert where the tensor has two dimensions.
    """

    left: Float64s
    right: Float64s
    scale: float

    def of_rows(self, start: int, stop: int) -> Float64s:
        """Return what is added to rows start to stop of the tensor, counted over all experts."""
        n_rows = self.left.shape[1]
        parts = []
        while start < stop:
            expert, row = divmod(start, n_rows)
            end = min(n_rows, row + stop - start)
            parts.append(self.scale * (self.left[expert, row:end] @ self.right[expert]))
            start += end - row
        return np.concatenate(parts)


def merged_with(
    model: Path, adapter: Path, announce: Callable[[str], None] = lambda _: None
) -> Path:
    """Return the GGUF file of a model with an adapter merged: from the user's cache, or made now.

    announce gets a line for what is done. Raises CheckpointError for an adapter that is none, is of
    another model, or does more than LoRA, and for a base that is quantized; GGUFError for damaged
    files or a full disk.
    """
    if adapter.suffix == ".safetensors":
        raise CheckpointError(f"{adapter}: name its folder, with {ADAPTER_CONFIG}")
    with open_gguf(model, kind_check=True) as base, open_gguf(adapter) as file:
        _require_adapter(file, base)
        factors = _pairs(file, base)
        digest = hashlib.sha256("".join(map(file_sha256, base.paths)).encode()).hexdigest()
        adapter_sha256 = file_sha256(adapter)
        folder = converted_folder() / f"{digest[:16]}-{adapter_sha256[:16]}"
        path = folder / f"{model_stem(model)}-{model_stem(adapter)}.gguf"
        if path.exists():
            announce(f"{adapter}: merged before, {path}")
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise CheckpointError(f"{folder}: cannot be made: {e.strerror}") from None
        if skipped := [t.name for t in file.tensors if not t.name.endswith((_A, _B))]:
            announce(
                f"{adapter}: leaves out {format_count(len(skipped), 'norm')} ({skipped[0]!r} "
                "first), as llama.cpp does"
            )
        layout = plan_layout(path, base, {}, {_MERGED_KEY: string(adapter_sha256)})
        announce(
            f"{adapter}: changes {format_count(len(factors), 'tensor')} of {model}; merged into a "
            f"copy of {format_bytes(layout.n_bytes)}, kept as {path}"
        )
        with GGUFOutput(layout, base, force=True) as out:
            for tensor in base.tensors:
                pair = factors.get(tensor.name)
                _write(base, tensor, None if pair is None else _read_factors(file, *pair), out)
            file.require_unchanged()
            out.commit()
    return path


def _require_adapter(file: GGUFFile, base: GGUFFile) -> None:
    """Raise CheckpointError unless the file is a LoRA adapter for models of the base's kind."""
    path, metadata = file.paths[0], file.metadata
    kind = metadata.string("general.type")
    if kind != "adapter":
        raise CheckpointError(
            f"{path}: is no adapter (general.type is {kind!r}); expected a file that llama.cpp's "
            "convert_lora_to_gguf.py made, or the folder that peft saved"
        )
    method = metadata.string("adapter.type")
    if method != "lora":
        raise CheckpointError(f"{path}: is an adapter of kind {method!r}; 'lora' can be merged")
    if any(key.startswith("adapter.alora.") for key in metadata):
        raise CheckpointError(
            f"{path}: is an activated LoRA, which changes the model from some tokens on only; it "
            "cannot be merged, give it to llama.cpp with --lora when it runs the model"
        )
    if file.architecture != base.architecture:
        raise CheckpointError(
            f"{path}: is for {file.architecture!r} models, and {base.paths[0]} is "
            f"{base.architecture!r}; name the model that it was trained on"
        )


def _pairs(file: GGUFFile, base: GGUFFile) -> dict[str, tuple[TensorInfo, TensorInfo, float]]:
    """Return A, B and the scale of every tensor that the adapter changes, all known to suit it."""
    path, where = file.paths[0], base.paths[0]
    factors: dict[str, dict[str, TensorInfo]] = {}
    for tensor in file.tensors:
        if tensor.name.endswith((_A, _B)):
            name, end = tensor.name[: -len(_A)], tensor.name[-len(_A) :]
            factors.setdefault(name, {})[end] = tensor
        elif not tensor.name.endswith("_norm.weight"):
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} is no part of LoRA; expected NAME{_A} and "
                f"NAME{_B}; merge it with peft (merge_and_unload) and name the merged folder"
            )
    if not factors:
        raise CheckpointError(f"{path}: has no tensors NAME{_A}: there is nothing to merge")
    found = {t.name: t for t in base.tensors}
    if unknown := [name for name in factors if name not in found]:
        raise CheckpointError(
            f"{path}: changes {format_count(len(factors), 'tensor')}, of which {where} lacks "
            f"{len(unknown)}, {unknown[0]!r} first; is it an adapter of another model?"
        )
    alpha = _alpha(file)
    pairs = {}
    for name, pair in factors.items():
        target = found[name]
        if set(pair) != {_A, _B}:
            raise CheckpointError(f"{path}: has {', '.join(name + end for end in pair)} only")
        if target.type_name not in _STORED:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {target.type_name}, and an adapter is merged into "
                f"{', '.join(_STORED)}; take the model in F16 or BF16"
            )
        a, b = pair[_A], pair[_B]
        rank = _require_shapes(path, target, a, b)
        pairs[name] = (a, b, alpha / rank if alpha else 1.0)
    return pairs


def _alpha(file: GGUFFile) -> float:
    kinds = (ValueType.FLOAT32, ValueType.FLOAT64)
    if _ALPHA not in file.metadata:
        return 0.0
    value = file.metadata[_ALPHA] if file.metadata.types[_ALPHA] in kinds else None
    if not isinstance(value, float) or not math.isfinite(value):
        raise CheckpointError(f"{file.paths[0]}: {_ALPHA} is no finite number")
    return value


def _require_shapes(path: Path, target: TensorInfo, a: TensorInfo, b: TensorInfo) -> int:
    """Return the rank; raise CheckpointError where B A has not the target's shape."""
    rank = b.shape[0]
    n_in, n_out, n_experts, *more = _four(target.shape)
    expected = (_four((n_in, rank, n_experts)), _four((rank, n_out, n_experts)))
    if target.name == TOKEN_EMBEDDING:
        expected = (_four((rank, n_out)), _four((rank, n_in)))
    if more != [1] or not rank or (_four(a.shape), _four(b.shape)) != expected:
        raise CheckpointError(
            f"{path}: the factors of {target.name!r} have shapes {a.shape} and {b.shape}, which do "
            f"not fit the model's, {target.shape}; is it an adapter of another model?"
        )
    return rank


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as ggml has it: of four dimensions."""
    return (*shape, 1, 1, 1)[: max(4, len(shape))]


def _read_factors(file: GGUFFile, a: TensorInfo, b: TensorInfo, scale: float) -> _Factors:
    left, right = _decoded(file, b), _decoded(file, a)
    if a.name == TOKEN_EMBEDDING + _A:
        left, right = right, left.transpose(0, 2, 1)
    return _Factors(left, right, scale)


def _decoded(file: GGUFFile, tensor: TensorInfo) -> Float64s:
    """Return a factor as float64, in NumPy's order, experts first."""
    weights = np.empty((tensor.n_rows, tensor.row_length), np.float32)
    try:
        _core.decode(tensor.type_name, file.read_rows(tensor, 0, tensor.n_rows), weights)
    except (ValueError, FormatError):
        raise CheckpointError(
            f"{file.paths[0]}: tensor {tensor.name!r} is {tensor.type_name}, which is not decoded "
            "here; convert the adapter to F16 or F32"
        ) from None
    n_experts = math.prod(tensor.shape[2:])
    return weights.astype(np.float64).reshape(n_experts, -1, tensor.row_length)


def _write(base: GGUFFile, tensor: TensorInfo, added: _Factors | None, out: GGUFOutput) -> None:
    """Write a tensor as it is, or with what is added to it."""
    step = max(1, _WEIGHTS_AT_ONCE // tensor.row_length)
    for start in range(0, tensor.n_rows, step):
        stop = min(tensor.n_rows, start + step)
        rows = base.read_rows(tensor, start, stop)
        if added is not None:
            kind = tensor.type_name
            weights = to_float(rows.view(_STORED[kind]), kind) + added.of_rows(start, stop)
            rows = np.ascontiguousarray(from_float(weights, kind)).view(np.uint8)
        out.write_at(tensor.name, start * tensor.row_bytes, np.ascontiguousarray(rows))
