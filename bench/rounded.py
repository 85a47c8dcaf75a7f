"""What benches share that round the matrices of a model's layers in a way of their own.

The sequences that are read, the inputs that the matrices have in them, copies of the model in which
to put what was rounded, and the KLD of these copies.
"""

import ctypes
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

from ramgguf.core.errors import EngineError
from ramgguf.core.mix import Part
from ramgguf.core.parallel import default_threads
from ramgguf.evaluate import score_held_out
from ramgguf.gguf.architecture import is_multiplied, layer_of
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama import ggml
from ramgguf.llama.capture import Tap
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.sources import parse_sources, shares
from ramgguf.llama.tokens import TokenRequest, draw_sequences
from ramgguf.quants.encoders.decoding import decode_rows, in_type

T = TypeVar("T")

N_CTX = 512
Floats = NDArray[np.float32]
Blocks = NDArray[np.uint8]
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


class Attention(Inputs):
    """A tap that also holds what each token of the last sequence receives, by layer.

    That is the attention paid to it, summed over heads and queries: received[layer] (n_tokens,).
    Only a context without flash attention computes it where a tap can see it.
    """

    NODE = b"kq_soft_max-"

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.received: dict[int, Floats] = {}

    def check_attention(self, n_layers: int) -> None:
        """Raise EngineError unless every layer was seen."""
        if missing := set(range(n_layers)) - self.received.keys():
            raise EngineError(f"no attention was seen in layers {sorted(missing)}: is it flash?")

    def _wanted(self, node: Any) -> str | None:
        name: bytes = node.name
        return name.decode() if name.startswith(self.NODE) else super()._wanted(node)

    def _take(self, name: str, node: Any) -> None:
        if not name.startswith(self.NODE.decode()):
            super()._take(name, node)
            return
        # (1, heads, queries, keys): a query's attention over all keys adds up to 1.
        found = ggml.read_array(ctypes.pointer(node), np.float32)
        _, n_heads, n_queries, _ = found.shape
        received = found.sum(axis=(0, 1, 2), dtype=np.float64)[:n_queries]
        if not np.isclose(received.sum(), n_heads * n_queries, rtol=1e-4):
            raise EngineError(f"{name} adds up to {received.sum():g}, not {n_heads * n_queries}")
        self.received[int(name.removeprefix(self.NODE.decode()))] = received.astype(np.float32)


class PlainAttention(LlamaModel):
    """A model without flash attention, which decodes a sequence at once."""

    def new_context(self, **changed: Any) -> Any:
        """Return a context that computes the attention of all queries to all keys."""
        disabled = self.llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return super().new_context(flash_attn_type=disabled, **changed)

    def _batch_size(self) -> int:
        return self.n_ctx


def layer_matrices(source: GGUFFile) -> list[str]:
    """Return the names of layers' matrices that activations are multiplied with, if quantizable."""
    return [
        t.name
        for t in source.tensors
        if layer_of(t.name) is not None
        and is_multiplied(t.name, t.shape, source.architecture, tied=False)
    ]


def loaded(path: Path, tap: Tap | None = None) -> LlamaModel:
    """Return the model with a context of N_CTX tokens; a tap is shown what it computes."""
    of = PlainAttention if isinstance(tap, Attention) else LlamaModel
    return of(
        path, n_ctx=N_CTX, n_threads=default_threads(), safe_kernels=True,
        eval_callback=tap and tap.callback,
    )  # fmt: skip


def sequences(source: GGUFFile, n: int, first: int = 0) -> Iterator[Any]:
    """Yield n sequences of the mix's calibration part, of each domain from number `first` on."""
    sources = parse_sources("mix", source)
    with loaded(source.paths[0]) as model:
        for one, count in zip(sources, shares(sources, n), strict=True):
            request = TokenRequest("rtn", tokens=one.kind, corpus=one.corpus, n_ctx=N_CTX)
            yield from draw_sequences(model, request, range(first, first + count))


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


def put_rounded(
    source: GGUFFile,
    data: Data,
    name: str,
    format_: str,
    encode: Callable[[Floats], Blocks],
    columns: Floats | None = None,
) -> None:
    """Put a matrix in the data of a copy as it is in the format, by what makes blocks of its rows.

    With scales, columns are rounded with these in them, and what comes out is divided again.
    """
    tensor = source.tensor(name)
    rows = source.read_rows(tensor, 0, tensor.n_rows)
    weights = decode_rows(tensor.type_name, rows, tensor.row_length)
    if columns is not None:
        weights *= columns
    decoded = decode_rows(format_, encode(weights), tensor.row_length)
    if columns is not None:
        decoded /= columns
    after = in_type(tensor.type_name, decoded)
    data[name][:] = after.view(data[name].dtype).reshape(data[name].shape)


def print_klds(
    files: Mapping[str, Path], source: Path, *, n_ctx: int, rounds: int, part: Part = "gate"
) -> dict[str, dict[str, Any]]:
    """Print each file's KLD to the source on held-out windows, and as a ratio to the first file's.

    The logarithm of a window's ratio is averaged over all windows, ± the standard error of that
    mean; in parentheses are the geometric means of each domain. Returns what a row of results says
    of each file: the domains of the windows, and their KLD.
    """
    scores = score_held_out(
        list(files.values()), source, part=part, n_ctx=n_ctx, max_rounds=rounds, seconds=None
    )
    klds = [np.array([w.kld_sum / w.n_tokens for w in s.windows]) for s in scores]
    domains = np.array([w.domain for w in scores[0].windows])
    found = {}
    for name, kld in zip(files, klds, strict=True):
        logs = np.log(kld / klds[0])
        each = [f"{d} {np.exp(logs[domains == d].mean()):.2f}" for d in dict.fromkeys(domains)]
        print(
            f"{name}: KLD {kld.mean():.4f}, × {kld.mean() / klds[0].mean():.3f}, mean log ratio "
            f"{logs.mean():+.3f} ± {logs.std(ddof=1) / np.sqrt(len(logs)):.3f} ({', '.join(each)})"
        )
        found[name] = {"domains": domains.tolist(), "kld": [round(k, 6) for k in kld.tolist()]}
    return found
