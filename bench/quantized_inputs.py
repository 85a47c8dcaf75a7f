"""Error feedback for the inputs that a weight will have, and for the outputs that it should make.

    python bench/quantized_inputs.py models/smol768-f16.gguf small.gguf --strengths 0 0.25 0.5 1

small.gguf is a quantized file of the model, made with error feedback. Its weights, decoded, and the
model read the same tokens of the mix; x̂ and x are a weight's inputs in them. Every matrix of a
layer is rounded anew, in its format, with the Hessian of x̂, and for W + s · W Σ(x − x̂)x̂ᵀ (Σx̂x̂ᵀ)⁻¹,
which with strength s = 1 makes of x̂ what W makes of x, in the sense of least squares. (GPTAQ,
arXiv 2504.02692, and Qronos, arXiv 2505.11695, do this layer after layer; here all layers are
corrected at once, for the inputs in small.gguf.) Prints each file's KLD, on held-out windows of
every domain, as a ratio to that of small.gguf.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from ramgguf.core.parallel import default_threads
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.quants.decoded import write_decoded
from ramgguf.quants.encoders import gptq
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian
from rounded import (
    N_CTX,
    Data,
    Inputs,
    in_threads,
    layer_matrices,
    loaded,
    print_klds,
    rounded_copies,
    sequences,
)

Floats = NDArray[np.float32]


@dataclass
class Moments:
    """Σx̂x̂ᵀ and Σ(x − x̂)x̂ᵀ by owner of the input, over n_tokens; owners by weight."""

    owners: Mapping[str, str] = field(default_factory=dict)
    own: dict[str, Floats] = field(default_factory=dict)
    cross: dict[str, Floats] = field(default_factory=dict)
    n_tokens: int = 0


def moments(source: GGUFFile, decoded: Path, names: Sequence[str], n: int) -> Moments:
    """Read the sequences by both models and return what their inputs have in common."""
    found = Moments()
    taps = [Inputs(names), Inputs(names)]
    paths = (source.paths[0], decoded)
    models = [loaded(path, tap) for path, tap in zip(paths, taps, strict=True)]
    for ids in sequences(source, n):
        for model, tap in zip(models, taps, strict=True):
            model.clear()
            model.decode(ids)
            tap.check()
        found.n_tokens += len(ids)
        for name, x_hat in taps[1].last.items():
            width = x_hat.shape[1]
            for sums in (found.own, found.cross):
                sums.setdefault(name, np.zeros((width, width), np.float32))
            found.own[name] += x_hat.T @ x_hat
            found.cross[name] += (taps[0].last[name] - x_hat).T @ x_hat
    for model in models:
        model.close()
    found.owners = taps[0].taken.owners
    return found


def rounded_again(
    source: GGUFFile, small: Path, outputs: Mapping[float, Path], found: Moments
) -> None:
    """Write the files: small with the matrices of layers rounded anew, by strength."""
    formats = {t.name: t.tensor_type.name for t in gguf.GGUFReader(small).tensors}
    weights: dict[str, list[str]] = {}
    for name, owner in found.owners.items():
        if formats[name] in gptq.FORMATS:
            weights.setdefault(owner, []).append(name)

    def correct(owner: str, copies: list[Data]) -> None:
        hessian = Hessian.of(found.own[owner], found.n_tokens)
        factor = cho_factor(hessian.damped.astype(np.float64), overwrite_a=True)
        cross = found.cross[owner].T.astype(np.float64) / found.n_tokens
        change = cho_solve(factor, cross).T.astype(np.float32)
        importance = np.ascontiguousarray(hessian.mean.diagonal())
        for name in weights[owner]:
            tensor = source.tensor(name)
            rows = source.read_rows(tensor, 0, tensor.n_rows)
            w = decode_rows(tensor.type_name, rows, tensor.row_length)
            towards = w @ change
            for strength, tensors in zip(outputs, copies, strict=True):
                aim = np.ascontiguousarray(w + np.float32(strength) * towards)
                blocks = gptq.encode(formats[name], aim, hessian, importance)
                tensors[name][:] = blocks.reshape(tensors[name].shape)

    with rounded_copies(small, outputs.values()) as copies:
        in_threads(lambda owner: correct(owner, copies), weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 1.0])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4, help="windows per domain")
    parser.add_argument("--n-ctx", type=int, default=N_CTX, help="tokens of a window")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_gguf(options.source) as source:
        decoded, outputs = Path(folder) / "decoded.gguf", dict[float, Path]()
        with open_gguf(options.small) as file:
            write_decoded(file, source, decoded, threads=default_threads())
        found = moments(source, decoded, layer_matrices(source), options.sequences)
        for strength in options.strengths:
            outputs[strength] = Path(folder) / f"{strength}.gguf"
        rounded_again(source, options.small, outputs, found)
        print_klds(
            {options.small.stem: options.small, **{f"{s:g}": p for s, p in outputs.items()}},
            options.source, n_ctx=options.n_ctx, rounds=options.rounds,
        )  # fmt: skip


if __name__ == "__main__":
    main()
