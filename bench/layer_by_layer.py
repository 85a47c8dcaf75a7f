"""Error feedback layer by layer: each layer meets what the quantized layers before it put out.

    python bench/layer_by_layer.py models/smol135d-f16.gguf small.gguf --strengths 0 0.25 0.5 1

small.gguf is a quantized file of the model, which gives the formats. Tokens of the mix are read by
the model and by what is rounded so far, a layer at a time: the residual streams x and x̂ are carried
from layer to layer, so that the whole takes about six passes over the model. In each layer the
matrices are rounded group after group (Q, K, V; output; gate, up; down), each for the inputs x̂
that the rounded ones before it leave: with the Hessian of x̂, and for W + s · W Σ(x − x̂)x̂ᵀ (Σx̂x̂ᵀ)⁻¹
(GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). "plain" is error feedback by the inputs x,
without any of this, from the same tokens. Prints each file's KLD on held-out windows, as a ratio to
plain's, and adds a row per file to bench/results/layer_by_layer.jsonl.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import threadpool_limits

from provenance import provenance
from ramgguf.core.parallel import default_threads
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.architecture import PARTS, layer_of, parse_name
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama import ggml, patched_model
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.residuals import ResidualWatch, layer_outputs
from ramgguf.quants.encoders import descent, gptq
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.hessian import Hessian
from rounded import N_CTX, layer_matrices, sequences

RESULTS = Path(__file__).parent / "results" / "layer_by_layer.jsonl"
# Matrices that share an input, in the order in which a layer computes them.
GROUPS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
Floats = NDArray[np.float32]


class InputWatch(ResidualWatch):
    """A watch that also takes the input of one weight; the first of its names that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: bytes | None = None
        self.inputs: list[Floats] = []

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        node = tensor.contents
        if node.op in self._multiplications and node.src[0].contents.name == self.weight:
            if not ask:
                x = ggml.read_array(node.src[1], np.float32)
                self.inputs.append(x.reshape(-1, x.shape[-1]).copy())
            return True
        return super()._sees(tensor, ask=ask)


class Layers:
    """The model, loaded from one layer after the other, with some of its weights rounded."""

    def __init__(self, source: GGUFFile, model: PatchedModel, watch: InputWatch) -> None:
        self.source, self.model, self.watch = source, model, watch

    def start_at(self, layer: int) -> None:
        """Load the model from this layer on."""
        if layer:
            self.model._reload(layer)

    def outputs(self, given: Sequence[NDArray[Any]]) -> list[Floats]:
        """Return what the first layer puts out of each of these sequences."""
        return [layer_outputs(self.model.model, self.watch, 0, one) for one in given]

    def inputs(self, given: Sequence[NDArray[Any]], name: str) -> Floats:
        """Return the inputs of a weight of the first layer, all sequences' tokens in turn."""
        self.watch.weight = name.replace(f"blk.{self.model.start}.", "blk.0.").encode()
        self.watch.inputs = []
        self.outputs(given)
        self.watch.weight = None
        return np.concatenate(self.watch.inputs)


def groups(source: GGUFFile, layer: int) -> list[list[str]]:
    """Return the layer's matrices, in the order in which they are computed."""
    names = [n for n in layer_matrices(source) if layer_of(n) == layer]
    parts = {name: parse_name(name).part for name in names}
    found = [[n for n in names if parts[n] in group] for group in GROUPS]
    if sum(map(len, found)) != len(names) or any(part not in PARTS for part in parts.values()):
        raise SystemExit(f"{source.paths[0]}: layer {layer} has other matrices: {sorted(names)}")
    return found


def rounded(
    layers: Layers,
    small: Mapping[str, Any],
    tokens: Sequence[NDArray[Any]],
    strength: float | None,
    encode: Any,
) -> dict[str, NDArray[np.uint8]]:
    """Return the blocks of all matrices of layers; strength None: by the inputs of the model.

    small holds the quantized file's tensors: their formats, and the blocks of those that have no
    error feedback.
    """
    blocks: dict[str, NDArray[np.uint8]] = {}
    x: Sequence[NDArray[Any]] = tokens
    x_hat: Sequence[NDArray[Any]] = tokens
    source, model = layers.source, layers.model
    for layer in range(source.n_trunk_layers or 0):
        layers.start_at(layer)
        order = groups(source, layer)
        own = [layers.inputs(x, group[0]) for group in order]
        after = layers.outputs(x)
        for group, of_model in zip(order, own, strict=True):
            meets = of_model if strength is None else layers.inputs(x_hat, group[0])
            hessian = Hessian.of(meets.T @ meets, len(meets))
            change: Floats | None = None
            if strength:
                factor = cho_factor(hessian.damped.astype(np.float64), overwrite_a=True)
                cross = ((of_model - meets).T @ meets).T.astype(np.float64) / len(meets)
                change = cho_solve(factor, cross).T.astype(np.float32) * np.float32(strength)

            def made(
                name: str, hessian: Hessian = hessian, change: Floats | None = change
            ) -> NDArray[np.uint8]:
                tensor, format_name = source.tensor(name), small[name].tensor_type.name
                if format_name not in gptq.FORMATS:
                    return np.array(small[name].data)
                rows = source.read_rows(tensor, 0, tensor.n_rows)
                w = decode_rows(tensor.type_name, rows, tensor.row_length)
                aim = w if change is None else np.ascontiguousarray(w + w @ change)
                importance = np.ascontiguousarray(hessian.mean.diagonal())
                return np.asarray(encode(format_name, aim, hessian, importance))

            with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor() as pool:
                found = list(pool.map(made, group))
            for name, data in zip(group, found, strict=True):
                tensor = source.tensor(name)
                blocks[name] = data
                format_name = small[name].tensor_type.name
                values = decode_rows(format_name, data, tensor.row_length)
                if strength is not None:
                    model.put(tensor, in_type(tensor.type_name, values))
        x_hat = after if strength is None else layers.outputs(x_hat)
        x = after
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3, help="windows per domain")
    parser.add_argument("--descent", action="store_true", help="coordinate descent after feedback")
    parser.add_argument("--folder", type=Path, default=Path("models"))
    options = parser.parse_args()
    small = {t.name: t for t in gguf.GGUFReader(options.small).tensors}
    encode = descent.encode if options.descent else gptq.encode
    files: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    with open_gguf(options.source) as source:
        tokens = list(sequences(source, options.sequences))
        for strength in (None, *options.strengths):
            name = "plain" if strength is None else f"{strength:g}"
            files[name] = options.folder / f"{options.small.stem}-layer-{name}.gguf"
            began = time.perf_counter()
            with (
                tempfile.TemporaryDirectory() as scratch,
                patch.object(patched_model, "ResidualWatch", InputWatch),
                PatchedModel(
                    source, Path(scratch), n_ctx=N_CTX, n_threads=default_threads()
                ) as model,
            ):
                watch = model._watch
                assert isinstance(watch, InputWatch)
                layers = Layers(source, model, watch)
                blocks = rounded(layers, small, tokens, strength, encode)
            seconds[name] = time.perf_counter() - began
            print(f"{name}: {seconds[name]:.0f} s", flush=True)
            shutil.copy(options.small, files[name])
            data = {t.name: t.data for t in gguf.GGUFReader(files[name], "r+").tensors}
            for tensor, made in blocks.items():
                data[tensor][:] = made.reshape(data[tensor].shape)
            for array in data.values():
                if isinstance(array, np.memmap):
                    array.flush()
    scores = score_held_out(
        list(files.values()), options.source, n_ctx=N_CTX, max_rounds=options.rounds, seconds=None
    )
    klds = [[w.kld_sum / w.n_tokens for w in s.windows] for s in scores]
    with RESULTS.open("a") as out:
        for (name, path), kld, score in zip(files.items(), klds, scores, strict=True):
            logs = np.log(np.array(kld) / klds[0])
            error = logs.std(ddof=1) / np.sqrt(len(logs))
            print(
                f"{name}: KLD {np.mean(kld):.5f}, × {np.mean(kld) / np.mean(klds[0]):.3f}, "
                f"mean log ratio {logs.mean():+.3f} ± {error:.3f}"
            )
            row = {
                "model": options.source.stem,
                "small": options.small.name,
                "strength": name,
                "encoder": "descent" if options.descent else "gptq",
                "n_sequences": options.sequences,
                "n_bytes": path.stat().st_size,
                "domains": [w.domain for w in score.windows],
                "kld": [round(k, 6) for k in kld],
                "seconds": round(seconds[name], 1),
            }
            out.write(json.dumps({**row, **provenance()}) + "\n")


if __name__ == "__main__":
    main()
