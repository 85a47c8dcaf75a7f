"""A loaded model whose weights can be exchanged: one tensor at a time, in a private copy.

llama.cpp maps the file it loads and computes straight from the pages (without its extra buffer
types); what is written to the copy is what the next decode reads. The original is never touched.
The copy may be a stand-in, a quick quantization of the model: tensors are then put in its formats.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.errors import EngineError
from ramgguf.core.files import require_disk_space
from ramgguf.gguf.reader import GGUFFile, TensorInfo, open_gguf
from ramgguf.llama.kind import KindError
from ramgguf.llama.model import LlamaModel, Logits
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.scoring import RowPass
from ramgguf.quants.stand_in import stored_rows, write_stand_in


class PatchedModel:
    """A model loaded from a copy of its file in `folder`. Use as a context manager.

    The copy takes as much disk as the model, or as its stand-in of the format given. It loses its
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
    ) -> None:
        self._file = file
        self._n_threads = n_threads
        names = [path.name for path in file.paths] if stand_in is None else ["stand-in.gguf"]
        self._paths = tuple(folder / name for name in names)
        self._rows = RowPass(n_threads)
        try:
            self._copy(stand_in)
            self._maps = tuple(np.memmap(path, np.uint8, mode="r+") for path in self._paths)
            self.model = LlamaModel(
                self._paths[0],
                n_ctx=n_ctx,
                n_threads=n_threads,
                safe_kernels=True,
                verbose=verbose,
            )
        except KindError as e:
            raise KindError(file.paths[0], e.kind) from None  # not the copy, which goes
        finally:
            self._remove()

    def _copy(self, stand_in: str | None) -> None:
        if stand_in is not None:
            write_stand_in(self._file, stand_in, self._paths[0], threads=self._n_threads)
            with open_gguf(self._paths[0]) as copied:
                self._places = {t.name: t for t in copied.tensors}
            return
        require_disk_space(self._paths[0].parent, self._file.n_bytes, error=EngineError)
        self._places = {t.name: t for t in self._file.tensors}
        for original, copy in zip(self._file.paths, self._paths, strict=True):
            try:
                shutil.copyfile(original, copy)
            except OSError as e:
                raise EngineError(f"{copy}: cannot be copied there: {e.strerror}") from None
        self._file.require_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.model.close()

    def _remove(self) -> None:
        for path in self._paths:
            path.unlink(missing_ok=True)

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
        place = self._places[tensor.name]
        if data is None:
            data = stored_rows(self._file, tensor, place.type_name, threads=self._n_threads)
        whole = self._maps[place.shard][place.offset : place.offset + place.n_bytes]
        whole[:] = data.reshape(-1)

    def stored_as(self, name: str) -> str:
        """Return the format that the copy has the tensor in."""
        return self._places[name].type_name

    def logits(self, ids: TokenIds) -> Logits:
        """Return a copy of the logits (tokens, vocabulary) of a sequence."""
        self.model.clear()
        out = np.empty((len(ids), self.model.vocab.n_tokens), np.float32)
        for start, end in self.model.chunks(len(ids)):
            out[start:end] = self.model.decode(ids[start:end])
        return out

    def divergence(self, ids: TokenIds, reference: Logits) -> NDArray[np.float64]:
        """Return KL(reference ‖ now) in nats for every token of the sequence.

        Raises EngineError when logits are not finite.
        """
        self.model.clear()
        unused = np.zeros(self.model.n_batch, np.int32)  # targets, of which KLD needs none
        parts = []
        for start, end in self.model.chunks(len(ids)):
            logits = self.model.decode(ids[start:end])
            found = self._rows.compare(reference[start:end], logits, unused[: end - start])
            if found["broken"].any():
                raise EngineError(f"{self._file.paths[0]}: logits are NaN or infinite")
            parts.append(found["kld"].astype(np.float64))
        return np.concatenate(parts)
