"""What benches share that round the matrices of a model's layers in a way of their own.

The sequences that are read, the inputs that the matrices have in them, copies of the model in which
to put what was rounded, and the KLD of these copies.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from ramgguf.core.parallel import default_threads
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.architecture import is_multiplied, layer_of
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sources import parse_sources, shares
from ramgguf.llama.tokens import TokenRequest, draw_sequences

T = TypeVar("T")

N_CTX = 512
Floats = NDArray[np.float32]
Data = dict[str, NDArray[Any]]  # of tensors, by name


class Inputs(Tap):
    """A tap that holds the inputs of the last sequence, by the first weight that has each."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.last: dict[str, Floats] = {}

    def _add(self, name: str, x: Floats, at: int, matrices: tuple[int, int]) -> None:
        super()._add(name, x, at, matrices)
        if self._taken.owners.get(name) == name:
            self.last[name] = np.array(x.reshape(-1, x.shape[-1]))


def layer_matrices(source: GGUFFile) -> list[str]:
    """Return the names of the matrices of layers that meet activations and may be quantized."""
    return [
        t.name
        for t in source.tensors
        if layer_of(t.name) is not None
        and is_multiplied(t.name, t.shape, source.architecture, tied=False)
    ]


def loaded(path: Path, tap: Tap | None = None) -> LlamaModel:
    """Return the model with a context of N_CTX tokens; a tap is shown what it computes."""
    return LlamaModel(
        path, n_ctx=N_CTX, n_threads=default_threads(), safe_kernels=True,
        eval_callback=tap and tap.callback,
    )  # fmt: skip


def sequences(source: GGUFFile, n: int) -> Iterator[Any]:
    """Yield n sequences of the mix's calibration part."""
    sources = parse_sources("mix", source)
    with loaded(source.paths[0]) as model:
        for one, count in zip(sources, shares(sources, n), strict=True):
            request = TokenRequest("rtn", tokens=one.kind, corpus=one.corpus, n_ctx=N_CTX)
            yield from draw_sequences(model, request, range(count))


@contextmanager
def rounded_copies(source: Path, outputs: Iterable[Path]) -> Iterator[list[Data]]:
    """Copy the model to the paths and yield each copy's data; what is put there is written."""
    copies = []
    for path in outputs:
        shutil.copy(source, path)
        copies.append({t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors})
    yield copies
    for copy in copies:
        for array in copy.values():
            if isinstance(array, np.memmap):
                array.flush()


def in_threads(work: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """Return what the work makes of each name; every thread multiplies matrices alone."""
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(default_threads()) as pool:
        return list(pool.map(work, names))


def print_klds(files: Mapping[str, Path], source: Path, *, n_ctx: int, rounds: int) -> None:
    """Print each file's KLD to the source on held-out windows, and as a ratio to the first file's.

    The logarithm of a window's ratio is averaged over all windows, ± the standard error of that
    mean; in parentheses are the geometric means of each domain.
    """
    scores = score_held_out(
        list(files.values()), source, part="gate", n_ctx=n_ctx, max_rounds=rounds, seconds=None
    )
    klds = [np.array([w.kld_sum / w.n_tokens for w in s.windows]) for s in scores]
    domains = np.array([w.domain for w in scores[0].windows])
    for name, kld in zip(files, klds, strict=True):
        logs = np.log(kld / klds[0])
        each = [f"{d} {np.exp(logs[domains == d].mean()):.2f}" for d in dict.fromkeys(domains)]
        print(
            f"{name}: KLD {kld.mean():.4f}, × {kld.mean() / klds[0].mean():.3f}, mean log ratio "
            f"{logs.mean():+.3f} ± {logs.std(ddof=1) / np.sqrt(len(logs)):.3f} ({', '.join(each)})"
        )
