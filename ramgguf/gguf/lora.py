"""LoRA adapters of peft, merged into a checkpoint: W + scale · B A.

The arithmetic is that of peft (https://github.com/huggingface/peft, tuners/lora): scale is alpha /
r, or alpha / √r with use_rslora. Sums are taken in float64 and rounded once, to W's own dtype.
"""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import CheckpointError
from ramgguf.core.units import format_count
from ramgguf.gguf.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    folder_sha256,
    plain_name,
    read_object,
)
from ramgguf.gguf.safetensors import StoredTensor, from_float, read_header, to_float

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.weight)?")
_SAVED = re.compile(r"(\.modules_to_save|\.original_module|\.base_layer)?\.weight$")
_WEIGHTS = "adapter_model.safetensors"
_ROWS_AT_ONCE = 1 << 22  # weights of a matrix that are merged at a time
# Keys of the config that change the arithmetic, with the values that leave it alone.
_UNSUPPORTED = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    # Others (PiSSA, OLoRA, CorDA, LoftQ) start from a base that they have changed.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors."""

    folder: Path
    config: dict[str, Any]
    factors: dict[str, dict[str, StoredTensor]]  # of a module: A and B
    saved: dict[str, StoredTensor]  # whole tensors that replace the base's, by its name

    @classmethod
    def of(cls, folder: Path) -> "Adapter":
        """Return the adapter; CheckpointError says what it is instead, or what it needs."""
        for name in (ADAPTER_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: has no {name}; expected the folder of a LoRA adapter as peft saves "
                    "it"
                )
        config = read_object(folder / ADAPTER_CONFIG)
        kind = str(config.get("peft_type"))
        if kind.upper() != "LORA":
            raise CheckpointError(f"{folder}: is an adapter of kind {kind}; LORA can be merged")
        for key, plain in _UNSUPPORTED.items():
            if config.get(key) not in plain:
                raise CheckpointError(
                    f"{folder}: {key} is {config[key]!r}, which is not merged here; merge it with "
                    "peft (merge_and_unload) and name the merged folder"
                )
        factors: dict[str, dict[str, StoredTensor]] = {}
        saved = {}
        for name, tensor in read_header(folder / _WEIGHTS).items():
            plain_name = name.removeprefix(_PREFIX)
            if part := _FACTOR.fullmatch(plain_name):
                key = part["which"] + ("e" if part["embedding"] else "")
                factors.setdefault(part["module"], {})[key] = tensor
            elif _SAVED.search(plain_name):
                saved[_SAVED.sub(".weight", plain_name)] = tensor
            else:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is no part of LoRA that is known here; merge it "
                    "with peft (merge_and_unload) and name the merged folder"
                )
        for module, pair in factors.items():
            if set(pair) not in ({"A", "B"}, {"Ae", "Be"}):
                raise CheckpointError(f"{folder}: module {module!r} has {', '.join(pair)} only")
        return cls(folder, config, factors, saved)

    def sha256(self) -> str:
        """Return the hash of its files."""
        return folder_sha256(self.folder, (self.folder / _WEIGHTS,))

    def scale(self, module: str, rank: int) -> float:
        """Return what the product of a module's factors is multiplied by."""
        alpha = self._of_module("alpha_pattern", module, self.config.get("lora_alpha", rank))
        try:
            scale = float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        except (TypeError, ValueError, OverflowError):
            scale = math.nan
        if not math.isfinite(scale):
            raise CheckpointError(f"{self.folder}: lora_alpha is {alpha!r}; expected a number")
        return scale

    def _of_module(self, key: str, module: str, default: Any) -> Any:
        """Return what a pattern of the config says of a module; patterns match names' ends."""
        patterns = self.config.get(key) or {}
        try:
            for pattern, value in patterns.items():
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    return value
        except (AttributeError, re.error) as e:
            raise CheckpointError(
                f"{self.folder}: {key} is {patterns!r}; expected an object of regexes: {e}"
            ) from None
        return default


def merge(checkpoint: Checkpoint, adapter: Adapter, into: Path) -> Checkpoint:
    """Return a copy of the checkpoint in the folder `into` with the adapter merged.

    Raises CheckpointError when the adapter suits another model; its line names the tensor.
    """
    tensors = checkpoint.tensors
    changed = [*(f"{module}.weight" for module in adapter.factors), *adapter.saved]
    if unknown := [name for name in changed if name not in tensors]:
        raise CheckpointError(
            f"{adapter.folder}: changes {format_count(len(changed), 'tensor')}, of which "
            f"{checkpoint.folder} lacks {len(unknown)}, {unknown[0]!r} first; is it an adapter of "
            "another model?"
        )
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors":
            (into / path.name).symlink_to(path.absolute())
    for path in checkpoint.weights:
        shutil.copyfile(path, into / path.name)
        (into / path.name).chmod(0o600)
    merged = Checkpoint.of(into, f"{checkpoint.name}-{plain_name(adapter.folder)}")
    for name, new in adapter.saved.items():  # first: factors may be of a base that was saved
        old = merged.tensors[name]
        _require_shape(adapter, old, new.shape)
        _write(old, 0, to_float(new.values(), new.dtype))
    for module, pair in adapter.factors.items():
        _add(merged.tensors[f"{module}.weight"], pair, adapter, module)
    return merged


def _add(
    target: StoredTensor, pair: dict[str, StoredTensor], adapter: Adapter, module: str
) -> None:
    a, b = (
        to_float(np.asarray(pair[which].values()), pair[which].dtype)
        for which in sorted(pair)  # A, then B
    )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        raise CheckpointError(
            f"{adapter.folder}: the factors of {module!r} have shapes {a.shape} and {b.shape}; "
            "expected (rank, inputs) and (outputs, rank)"
        )
    scale = adapter.scale(module, a.shape[0])
    is_turned = "Ae" in pair or bool(adapter.config.get("fan_in_fan_out"))
    left, right = (a.T, b.T) if is_turned else (b, a)
    _require_shape(adapter, target, (left.shape[0], right.shape[1]))
    values = target.values()
    step = max(1, _ROWS_AT_ONCE // right.shape[1])
    for start in range(0, left.shape[0], step):
        rows = slice(start, start + step)
        delta = scale * (left[rows] @ right)
        _write(target, start, to_float(np.asarray(values[rows]), target.dtype) + delta)


def _require_shape(adapter: Adapter, target: StoredTensor, shape: tuple[int, ...]) -> None:
    if target.shape != shape:
        raise CheckpointError(
            f"{adapter.folder}: changes {target.name!r} with shape {shape}, and the checkpoint's "
            f"is {target.shape}; is it an adapter of another model?"
        )


def _write(target: StoredTensor, start: int, values: NDArray[np.float64]) -> None:
    values_of = target.values("r+")
    values_of[start : start + len(values)] = from_float(values, target.dtype)
    values_of.flush()
