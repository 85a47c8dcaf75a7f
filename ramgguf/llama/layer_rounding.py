"""Rounds a model layer by layer, each one for the inputs that those before it put out.

The residual streams of the model and of what is rounded so far are carried from layer to layer: of
each layer, the model reads its tokens once, the rounded one once for every input and once more. In
a layer, weights that share an input are rounded together, in the order in which they are computed.
"""

import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.closing import Closing
from ramgguf.core.errors import EngineError
from ramgguf.core.files import require_disk_space
from ramgguf.core.parallel import ordered_map
from ramgguf.gguf.architecture import layer_of
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.llama.layer_inputs import InputWatch, Rows, read_inputs
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.residuals import layer_outputs
from ramgguf.llama.sources import parse_sources, shares
from ramgguf.llama.tokens import TokenRequest, draw_sequences
from ramgguf.quants.codec import ErrorWeights
from ramgguf.quants.correction import ChangedInputs, InputSums
from ramgguf.quants.encoders import encoder
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.imatrix import Imatrix
from ramgguf.quants.roundtrip import SOURCES

_ADDED_ROWS = 2048  # inputs added to the sums at a time: with few, the sums' own memory is the cost
_ROUNDED_WEIGHTS = 1 << 20  # what a thread rounds at a time
_CHECKED_TOKENS = 64  # that show whether layers compute by themselves what they do in the model


class LayerRounding(Closing):
    """The source, loaded layer by layer, and a quantized file of it whose blocks become others.

    names are the tensors to be rounded anew, by the encoder, in the formats that they have in the
    file, by the matrix and its Hessians. Layers come in order, from the first. Needs as much disk
    in `folder` as the source takes, and the inputs of one layer. Raises EngineError where llama.cpp
    cannot start at a layer, or computes something else there.
    """

    def __init__(
        self,
        source: GGUFFile,
        quantized: GGUFFile,
        folder: Path,
        names: Sequence[str],
        *,
        encoder_name: str,
        imatrix: Imatrix,
        tokens: str,
        n_sequences: int,
        n_ctx: int,
        threads: int,
    ) -> None:
        changed = [t for t in source.tensors if quantized.tensor(t.name).type_name != t.type_name]
        if others := {t.type_name for t in changed} - set(SOURCES):
            raise EngineError(f"it takes weights in F32, F16 or BF16, not in {min(others)}")
        self._source, self._quantized, self._folder = source, quantized, folder
        self._names, self._encoder = frozenset(names), encoder(encoder_name)
        self._imatrix, self._threads = imatrix, threads
        self._maps = [np.memmap(path, np.uint8, "r+") for path in quantized.paths]
        self._watch = InputWatch()
        self._model = PatchedModel(
            source, folder, n_ctx=n_ctx, n_threads=threads, watch=self._watch
        )
        if self.n_layers < 2 or n_sequences < 2:
            self._model.close()
            raise EngineError("it takes layers that can be loaded by themselves, and two sequences")
        self._next = 0
        self._x: list[NDArray[Any]] = list(self._drawn(tokens, n_sequences, n_ctx))
        self._x_hat = self._x
        self._n_tokens = sum(map(len, self._x))
        few = self._x[0][:_CHECKED_TOKENS]
        self._known = [
            layer_outputs(self._model.model, self._watch, k, few) for k in range(self.n_layers)
        ]

    def close(self) -> None:
        """Free the model; its copy goes with it."""
        self._model.close()

    @property
    def n_layers(self) -> int:
        """The layers that there are to be rounded."""
        return min(self._model.n_layers, self._source.n_trunk_layers or 0)

    def _drawn(self, tokens: str, n_sequences: int, n_ctx: int) -> Iterator[NDArray[Any]]:
        sources = parse_sources(tokens, self._source)
        for one, n in zip(sources, shares(sources, n_sequences), strict=True):
            request = TokenRequest("rtn", tokens=one.kind, corpus=one.corpus, n_ctx=n_ctx)
            yield from draw_sequences(self._model.model, request, range(n))

    def round(self, layer: int) -> tuple[tuple[str, ...], int]:
        """Round the layer's weights; return which they are, and the checksum of their blocks."""
        self._begin(layer)
        inputs = _Inputs(self._folder, self._n_tokens)
        names = {self._in_graph(t.name): t.name for t in self._of(layer) if self._is_rounded(t)}
        after = []
        for ids in self._x:
            with self._watch.watching(names, inputs.take):
                after.append(layer_outputs(self._model.model, self._watch, 0, ids))
            inputs.sequence_ended()
        self._put_quantized(layer, leave=inputs.weights)
        for group in inputs.groups:
            changed = self._changed(group[0], inputs.of(group[0]))
            for name in group:
                self._round(self._source.tensor(name), changed)
        self._end(after)
        rounded = tuple(inputs.weights)
        return rounded, self.checksum(rounded)

    def skip(self, layer: int) -> None:
        """Go on after a layer whose blocks are those that it has in the file."""
        self._begin(layer)
        after = [layer_outputs(self._model.model, self._watch, 0, ids) for ids in self._x]
        self._put_quantized(layer)
        self._end(after)

    def checksum(self, names: Sequence[str]) -> int:
        """Return the checksum of the blocks that these tensors have in the file."""
        found = 0
        for name in names:
            found = zlib.crc32(self._blocks(name).data, found)
        return found

    def _begin(self, layer: int) -> None:
        if layer != self._next:
            raise EngineError(f"layer {layer} after {self._next - 1}; this is a bug of ramgguf")
        if layer:
            self._model.reload(layer)
            before = self._known[layer - 1]
            found = layer_outputs(self._model.model, self._watch, 0, before)
            if not np.array_equal(found, self._known[layer]):
                raise EngineError(f"layer {layer} by itself computes something else")
        self._next = layer + 1

    def _end(self, after: list[Rows]) -> None:
        """Go on with what the layer puts out: of the model, and now of what is rounded."""
        for blocks in self._maps:
            blocks.flush()
        self._x_hat = [layer_outputs(self._model.model, self._watch, 0, x) for x in self._x_hat]
        self._x = [*after]
        self._source.require_unchanged()

    def _of(self, layer: int) -> list[TensorInfo]:
        return [t for t in self._source.tensors if layer_of(t.name) == layer]

    def _is_rounded(self, tensor: TensorInfo) -> bool:
        return tensor.name in self._names and len(tensor.shape) == 2

    def _in_graph(self, name: str) -> bytes:
        layer = self._model.start
        return name.replace(f"blk.{layer}.", "blk.0.", 1).encode()

    def _blocks(self, name: str) -> NDArray[np.uint8]:
        """Return the tensor's rows in the file, (rows, bytes); what is written there is its own."""
        t = self._quantized.tensor(name)
        return self._maps[t.shard][t.offset : t.offset + t.n_bytes].reshape(t.n_rows, -1)

    def _put_quantized(self, layer: int, leave: Collection[str] = ()) -> None:
        """Make the layer's tensors, and those before the first layer, what the file holds."""
        wanted = self._of(layer)
        if layer == 0:
            wanted += [t for t in self._source.tensors if layer_of(t.name) is None]
        for tensor in wanted:
            kind = self._quantized.tensor(tensor.name).type_name
            if kind != tensor.type_name and tensor.name not in leave:
                for _ in ordered_map(partial(self._put, tensor), _parts(tensor), self._threads):
                    pass

    def _put(self, tensor: TensorInfo, rows: slice) -> None:
        """Make rows of a weight of the model what the file holds."""
        kind = self._quantized.tensor(tensor.name).type_name
        values = decode_rows(kind, np.ascontiguousarray(self._blocks(tensor.name)[rows]),
                             tensor.row_length)  # fmt: skip
        self._model.rows(tensor)[rows] = in_type(self._model.stored_as(tensor.name), values)

    def _changed(self, name: str, of_model: Rows) -> ChangedInputs:
        """Return what rounding needs of a weight's inputs; of_model are those of the model."""
        sums = InputSums(self._source.tensor(name).row_length, self._threads)
        in_graph, ends = self._in_graph(name), np.cumsum([len(ids) for ids in self._x_hat])
        for half in range(2):  # every other sequence, so that each half has all kinds of text
            mine: list[Rows] = []
            theirs: list[Rows] = []
            for ids, end in zip(self._x_hat[half::2], ends[half::2], strict=True):
                mine += read_inputs(self._model.model, self._watch, in_graph, ids)
                theirs.append(of_model[end - len(ids) : end])
                if sum(map(len, mine)) >= _ADDED_ROWS or end >= ends[-2]:
                    sums.add(half, np.concatenate(theirs), np.concatenate(mine))
                    mine, theirs = [], []
        return sums.changed_inputs()

    def _round(self, tensor: TensorInfo, changed: ChangedInputs) -> None:
        """Write the tensor's new blocks into the file, and what they stand for into the model."""
        format_name = self._quantized.tensor(tensor.name).type_name
        weighed, encode = ErrorWeights.of(tensor, self._imatrix), self._encoder.encode_output
        if weighed.hessian is None or weighed.importance is None or encode is None:
            raise EngineError(f"{tensor.name} has no Hessian; this is a bug of ramgguf")
        hessian, importance = weighed.hessian(), weighed.importance[0]
        blocks = self._blocks(tensor.name)
        _ = hessian.units, hessian.damped  # made once, before threads ask for them
        rows = self._source.read_rows(tensor, 0, tensor.n_rows)
        weights = decode_rows(tensor.type_name, rows, tensor.row_length)
        aims = changed.corrected(weights)

        def work(part: slice) -> None:
            blocks[part] = encode(format_name, aims[part], hessian, importance)
            self._put(tensor, part)

        for _ in ordered_map(work, _parts(tensor), self._threads):
            pass


def _parts(tensor: TensorInfo) -> list[slice]:
    """Return the tensor's rows in parts of _ROUNDED_WEIGHTS."""
    step = max(1, _ROUNDED_WEIGHTS // tensor.row_length)
    return [slice(a, min(a + step, tensor.n_rows)) for a in range(0, tensor.n_rows, step)]


class _Inputs:
    """The inputs of one layer's weights in the model, in a file without a name.

    groups are the weights that share an input, in the order in which these are computed.
    """

    def __init__(self, folder: Path, n_tokens: int) -> None:
        self._folder, self._n_tokens = folder, n_tokens
        self._groups: dict[int, list[str]] = {}  # by the input's address in the first graph
        self._of: dict[str, NDArray[np.float32]] = {}
        self._filled: dict[str, int] = {}
        self._is_first = True

    @property
    def groups(self) -> list[list[str]]:
        return list(self._groups.values())

    @property
    def weights(self) -> dict[str, None]:
        """All weights of the groups, in their order."""
        return dict.fromkeys(name for group in self.groups for name in group)

    def of(self, name: str) -> Rows:
        """Return the inputs (tokens, columns) of a group's first weight."""
        if self._filled[name] != self._n_tokens:
            raise EngineError(f"{name} had {self._filled[name]} inputs for {self._n_tokens} tokens")
        return self._of[name]

    def take(self, name: str, address: int, x: Rows) -> None:
        """Keep an input, of a group's first weight."""
        if self._is_first and name not in self.weights:
            self._groups.setdefault(address, []).append(name)
            if self._groups[address][0] == name:
                shape = self._n_tokens, x.shape[1]
                require_disk_space(self._folder, 4 * shape[0] * shape[1], error=EngineError)
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._of[name] = np.memmap(file, np.float32, "w+", shape=shape)
                self._filled[name] = 0
        if name in self._of:
            at = self._filled[name]
            self._of[name][at : at + len(x)] = x[: self._n_tokens - at]
            self._filled[name] = at + len(x)

    def sequence_ended(self) -> None:
        """Weights without an input by now are none of the layer's."""
        self._is_first = False
