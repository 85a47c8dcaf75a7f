"""A loaded model whose weights can be exchanged: one tensor at a time, in a private copy.

llama.cpp maps the file it loads and computes straight from the pages (without its extra buffer
types); what is written to the copy is what the next decode reads. The original is never touched.
The copy may be a stand-in, a quick quantization of the model: tensors are then put in its formats.
Matrices in BF16 are F16 in the copy, where their inputs fit F16, too: kernels round
inputs to the type of the weights, and BF16 would round them so coarsely that it shows in the KLD.

The layers before a changed one compute what they always do. So the copy can be loaded from a layer
on, and gets the residual stream that enters there, captured once for each sequence, as its input.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.gguf.layered import LayeredCopy
from ramgguf.gguf.reader import GGUFFile, TensorInfo
from ramgguf.llama.input_range import InputRange
from ramgguf.llama.model import LlamaModel, Logits
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.residuals import ResidualWatch, Rows, layer_outputs
from ramgguf.llama.scoring import RowPass
from ramgguf.llama.tokens import TokenRequest, draw_sequences
from ramgguf.quants.roundtrip import stored
from ramgguf.quants.stand_in import fits_f16, stand_in_metadata, store_rows, types_for_passes

_RANGE_TOKENS = 32
_LARGEST_INPUT = 8192.0  # F16 ends at 65504; what other tokens bring is left room


class PatchedModel:
    """A model loaded from a copy of its file in `folder`. Use as a context manager.

    The copy takes as much disk as the model, or as its stand-in of the format given. It has no
    name once it is loaded, so that nothing is left of it however this process ends.
    """

    def __init__(
        self,
        file: GGUFFile,
        folder: Path,
        *,
        n_ctx: int,
        n_threads: int,
        verbose: bool = False,
        stand_in: str | None = None,
        watch: ResidualWatch | None = None,
    ) -> None:
        self._file = file
        self._n_ctx, self._n_threads, self._verbose = n_ctx, n_threads, verbose
        self._rows = RowPass(n_threads)
        self._watch = watch or ResidualWatch()
        self._inputs: dict[bytes, NDArray[np.float32]] = {}  # of the layer where the copy starts
        self._copy = self._written(folder, stand_in)
        try:
            if stand_in is None and self._is_out_of_range():
                self._copy.close()
                self._copy = LayeredCopy(file, folder, {}, {}, stored, threads=n_threads)
            self.model = self._load(self._watch.callback)
        except BaseException:
            self._copy.close()
            raise
        self._copy.unlink()

    def _written(self, folder: Path, stand_in: str | None) -> LayeredCopy:
        """Return the copy; matrices that do not fit F16 are BF16 as in the source."""
        file, too_large = self._file, set[str]()
        types = types_for_passes(file, stand_in)

        def convert(tensor: TensorInfo, rows: NDArray[np.uint8], to: str) -> NDArray[np.uint8]:
            if (tensor.type_name, to) == ("BF16", "F16") and not fits_f16(rows):
                too_large.add(tensor.name)
                return rows  # as long; the copy is written anew
            return stored(tensor, rows, to)

        overrides = {} if stand_in is None else stand_in_metadata(stand_in)
        copy = LayeredCopy(file, folder, types, overrides, convert, threads=self._n_threads)
        if not too_large:
            return copy
        copy.close()
        types |= dict.fromkeys(too_large, "BF16")
        return LayeredCopy(file, folder, types, overrides, stored, threads=self._n_threads)

    def _is_out_of_range(self) -> bool:
        """Return whether matrices that are BF16 in the source have inputs near the end of F16."""
        if all(self.stored_as(t.name) == t.type_name for t in self._file.tensors):
            return False
        watch = InputRange()
        with self._load(watch.callback) as model:
            n_ctx = min(_RANGE_TOKENS, self._n_ctx)
            (ids,) = draw_sequences(model, TokenRequest("rtn", "random", n_ctx=n_ctx), range(1))
            return watch.read(model, ids) > _LARGEST_INPUT

    def _load(self, callback: Any) -> LlamaModel:
        began = time.perf_counter()
        model = LlamaModel(
            self._file.paths[0],
            n_ctx=self._n_ctx,
            n_threads=self._n_threads,
            safe_kernels=True,
            verbose=self._verbose,
            shards=self._copy.paths,
            takes_rows=self.start > 0,
            eval_callback=callback,
        )
        self.load_seconds = time.perf_counter() - began
        return model

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and remove its copy."""
        self.model.close()
        self._copy.close()

    @property
    def start(self) -> int:
        """The layer from which on the model is loaded."""
        return self._copy.start

    @property
    def n_layers(self) -> int:
        """Layers at which the model may start; 1: the first only."""
        return self._copy.n_layers

    def starts_there(self, layer: int, sequences: Sequence[TokenIds]) -> bool:
        """Return whether the model is loaded from the layer on, ready for these sequences."""
        return layer == self.start and (not layer or all(map(self.can_read, sequences)))

    def can_read(self, ids: TokenIds) -> bool:
        """Return whether the sequence can be decoded from where the model starts."""
        return self.start == 0 or ids.tobytes() in self._inputs

    def start_at(self, layer: int, sequences: Sequence[TokenIds] = ()) -> None:
        """Load the model from the layer on, for these sequences; weights must be the original's.

        Raises EngineError where llama.cpp cannot; the model is then whole.
        """
        if self.starts_there(layer, sequences):
            return
        if layer < self.start or not all(map(self.can_read, sequences)):
            self.reload(0)
        if layer == self.start:
            return
        try:
            rows = [self.residuals(ids, layer - 1) for ids in sequences]
            self.reload(layer)
            width = self.model.input_width
            if any(r.shape[1] != width for r in rows):
                raise EngineError(f"a layer's input has other columns than the {width} expected")
        except EngineError:
            self.reload(0)
            raise
        self._inputs = {ids.tobytes(): r for ids, r in zip(sequences, rows, strict=True)}

    def reload(self, layer: int) -> None:
        """Load the model from the layer on, for any rows: what enters there. Weights stay."""
        self.model.close()
        self._inputs = {}
        self._copy.start_at(layer)
        self.model = self._load(self._watch.callback)

    def _given(self, ids: TokenIds) -> NDArray[Any]:
        """Return what the model decodes for a sequence: its ids, or what enters the first layer."""
        return self._inputs[ids.tobytes()] if self.start else ids

    @contextmanager
    def replaced(self, tensor: TensorInfo, data: NDArray[np.uint8]) -> Iterator[None]:
        """While this lasts, the tensor's bytes are `data`; then they are the original's again."""
        self.put(tensor, data)
        try:
            yield
        finally:
            self.put(tensor, None)

    def put(self, tensor: TensorInfo, data: NDArray[np.uint8] | None) -> None:
        """Make `data` the tensor's bytes from now on; None gives it back the original's.

        data is in the format that the copy has the tensor in (stored_as).
        """
        rows = self.rows(tensor)
        if data is not None:
            rows[:] = data.reshape(rows.shape)
            return
        type_name = self.stored_as(tensor.name)
        store_rows(self._file, tensor, type_name, threads=self._n_threads, out=rows)

    def rows(self, tensor: TensorInfo) -> NDArray[np.uint8]:
        """Return the tensor's rows, uint8 (n_rows, bytes), in the model's own pages: what is
        written there is what the next decode reads.
        """
        place = self._copy.places[tensor.name]
        whole = self._copy.maps[place.shard][place.offset : place.offset + place.n_bytes]
        return whole.reshape(tensor.n_rows, -1)

    def stored_as(self, name: str) -> str:
        """Return the format that the copy has the tensor in."""
        return self._copy.places[name].type_name

    def logits(self, ids: TokenIds) -> Logits:
        """Return a copy of the logits (tokens, vocabulary) of a sequence."""
        out = np.empty((len(ids), self.model.vocab.n_tokens), np.float32)
        self.logits_into(out, ids)
        return out

    def logits_into(self, out: Logits, ids: TokenIds) -> None:
        """Fill `out`, (tokens, vocabulary), with the logits of a sequence."""
        for start, end, logits in self._decoded(ids):
            out[start:end] = logits

    def has_logits(self, ids: TokenIds, logits: Logits) -> bool:
        """Return whether the sequence's logits are these, bit by bit."""
        return all(np.array_equal(logits[a:b], found) for a, b, found in self._decoded(ids))

    def _decoded(self, ids: TokenIds) -> Iterator[tuple[int, int, Logits]]:
        """Yield the logits of the tokens from start to end, valid until the next are asked for."""
        self.model.clear()
        given = self._given(ids)
        for start, end in self.model.chunks(len(ids)):
            yield start, end, self.model.decode(given[start:end])

    def residuals(self, ids: TokenIds, layer: int) -> Rows:
        """Return the residual stream after the layer, (tokens, columns); no later one is computed.

        Raises EngineError where llama.cpp's graph does not name it.
        """
        return layer_outputs(self.model, self._watch, layer - self.start, self._given(ids))

    def divergence(self, ids: TokenIds, reference: Logits) -> NDArray[np.float64]:
        """Return KL(reference ‖ now) in nats for every token of the sequence.

        Raises EngineError when logits are not finite.
        """
        unused = np.zeros(self.model.n_batch, np.int32)  # targets, of which KLD needs none
        parts = []
        for start, end, logits in self._decoded(ids):
            found = self._rows.compare(reference[start:end], logits, unused[: end - start])
            if found["broken"].any():
                raise EngineError(f"{self._file.paths[0]}: logits are NaN or infinite")
            parts.append(found["kld"].astype(np.float64))
        return np.concatenate(parts)
