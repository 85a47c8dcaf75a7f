"""What the weights of a layer are multiplied with, while a model that starts there reads tokens."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ramgguf.llama import ggml
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.residuals import ResidualWatch

Rows = NDArray[np.float32]
Take = Callable[[str, int, Rows], None]


class InputWatch(ResidualWatch):
    """A watch that also hands on the inputs of weights, while `watching` lasts."""

    def __init__(self) -> None:
        super().__init__()
        self._names: Mapping[bytes, str] = {}
        self._take: Take = lambda *_: None
        self._ends_at: str | None = None

    @contextmanager
    def watching(
        self, names: Mapping[bytes, str], take: Take, *, ends_at: str | None = None
    ) -> Iterator[None]:
        """While this lasts, take gets a weight's name, where its input lies, and the input (tokens,
        columns), for each of the names, which are given by those in the graph. A graph ends once
        the weight ends_at has been multiplied.
        """
        self._names, self._take, self._ends_at = names, take, ends_at
        try:
            yield
        finally:
            self._names, self._take, self._ends_at = {}, lambda *_: None, None

    def _sees(self, tensor: Any, *, ask: bool) -> bool:
        node = tensor.contents
        name = None
        if node.op in self._multiplications and node.op != self._routed:
            name = self._names.get(node.src[0].contents.name)
        if name is None:
            return super()._sees(tensor, ask=ask)
        if ask:
            return True
        x = ggml.read_array(node.src[1], np.float32)
        self._take(name, ggml.address(node.src[1]), x.reshape(-1, x.shape[-1]))
        return name != self._ends_at


def read_inputs(
    model: LlamaModel, watch: InputWatch, name: bytes, sequence: NDArray[Any]
) -> Iterator[Rows]:
    """Yield what a weight of the model, which has the watch, is multiplied with in each graph while
    it reads a sequence: token ids, or rows. The graphs end there.
    """
    found: list[Rows] = []
    with watch.watching({name: ""}, lambda *taken: found.append(taken[2]), ends_at=""):
        model.clear()
        for start, end in model.chunks(len(sequence)):
            model.decode(sequence[start:end], ends_early=True)
            watch.raise_failure()
            yield from found
            found.clear()
