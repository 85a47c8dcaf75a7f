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
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from threadpoolctl import threadpool_limits

from ramgguf.core.parallel import default_threads
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.architecture import is_multiplied, layer_of
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sources import parse_sources, shares
from ramgguf.llama.tokens import TokenRequest, draw_sequences
from ramgguf.quants.decoded import write_decoded
from ramgguf.quants.encoders import gptq
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.hessian import Hessian

N_CTX = 512
Floats = NDArray[np.float32]


class Inputs(Tap):
    """A tap that holds the inputs of the last sequence, by the first weight that has each."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.last: dict[str, Floats] = {}

    def _add(self, name: str, x: Floats, at: int, matrices: tuple[int, int]) -> None:
        super()._add(name, x, at, matrices)
        if self._taken.owners.get(name) == name:
            self.last[name] = np.array(x.reshape(-1, x.shape[-1]))


@dataclass
class Moments:
    """Σx̂x̂ᵀ and Σ(x − x̂)x̂ᵀ by owner of the input, over n_tokens; owners by weight."""

    owners: Mapping[str, str] = field(default_factory=dict)
    own: dict[str, Floats] = field(default_factory=dict)
    cross: dict[str, Floats] = field(default_factory=dict)
    n_tokens: int = 0


def layer_matrices(source: GGUFFile) -> list[str]:
    """Return the names of the matrices of layers that meet activations and may be quantized."""
    return [
        t.name
        for t in source.tensors
        if layer_of(t.name) is not None
        and is_multiplied(t.name, t.shape, source.architecture, tied=False)
    ]


def sequences(source: GGUFFile, n: int) -> Iterator[Any]:
    """Yield n sequences of the mix's calibration part."""
    sources = parse_sources("mix", source)
    with LlamaModel(
        source.paths[0], n_ctx=N_CTX, n_threads=default_threads(), safe_kernels=True
    ) as model:
        for one, count in zip(sources, shares(sources, n), strict=True):
            request = TokenRequest("rtn", tokens=one.kind, corpus=one.corpus, n_ctx=N_CTX)
            yield from draw_sequences(model, request, range(count))


def moments(source: GGUFFile, decoded: Path, names: Sequence[str], n: int) -> Moments:
    """Read the sequences by both models and return what their inputs have in common."""
    found = Moments()
    taps = [Inputs(names), Inputs(names)]
    models = [
        LlamaModel(
            path, n_ctx=N_CTX, n_threads=default_threads(), safe_kernels=True,
            eval_callback=tap.callback,
        )
        for path, tap in zip((source.paths[0], decoded), taps, strict=True)
    ]  # fmt: skip
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
    data: dict[float, dict[str, Any]] = {}
    for strength, path in outputs.items():
        shutil.copy(small, path)
        data[strength] = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    formats = {t.name: t.tensor_type.name for t in gguf.GGUFReader(small).tensors}
    weights: dict[str, list[str]] = {}
    for name, owner in found.owners.items():
        if formats[name] in gptq.FORMATS:
            weights.setdefault(owner, []).append(name)

    def corrected(owner: str) -> None:
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
            for strength, tensors in data.items():
                aim = np.ascontiguousarray(w + np.float32(strength) * towards)
                blocks = gptq.encode(formats[name], aim, hessian, importance)
                tensors[name][:] = blocks.reshape(tensors[name].shape)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(corrected, weights))
    for tensors in data.values():
        for array in tensors.values():
            if isinstance(array, np.memmap):
                array.flush()


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
        files = [options.small, *outputs.values()]
        scores = score_held_out(
            files, options.source, part="gate", n_ctx=options.n_ctx, max_rounds=options.rounds,
            seconds=None,
        )  # fmt: skip
    klds = [np.array([w.kld_sum / w.n_tokens for w in s.windows]) for s in scores]
    for path, kld in zip(files, klds, strict=True):
        logs = np.log(kld / klds[0])
        print(
            f"{path.stem}: KLD {kld.mean():.4f}, × {kld.mean() / klds[0].mean():.3f}, "
            f"mean log ratio {logs.mean():+.3f} ± {logs.std(ddof=1) / np.sqrt(len(logs)):.3f}"
        )


if __name__ == "__main__":
    main()
