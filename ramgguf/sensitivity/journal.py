"""The file to which a sensitivity run writes each reading, and from which it goes on."""

from functools import cached_property
from pathlib import Path

import numpy as np

from ramgguf.core.documents import FrozenModel
from ramgguf.core.line_journal import LineJournal
from ramgguf.gguf.identity import Source
from ramgguf.llama.protocol import TokenIds
from ramgguf.quants.encoders import EncoderName
from ramgguf.quants.imatrix import ImportanceSource
from ramgguf.sensitivity.result import LayerReading, ProbeTokens, Reading
from ramgguf.sensitivity.timing import Costs


class Settings(FrozenModel):
    """What a run was settled to do: tokens, tensors, and what was promised about its cost.

    fingerprint is of the unchanged model's logits: where another one is found, numbers differ.
    names are in the order in which they are read, costs what was expected of that. carried are the
    tensors whose effect on a layer is read, to carry the α of names to those that are not in names.
    """

    source: Source
    encoder: EncoderName
    imatrix: ImportanceSource | None = None
    stand_in: str | None = None
    tokens: ProbeTokens
    ids: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    carried: tuple[str, ...] = ()
    fingerprint: str | None = None
    promise: str
    notes: tuple[str, ...]
    costs: Costs | None = None

    @cached_property
    def sequences(self) -> tuple[TokenIds, ...]:
        """The token ids, one array per sequence."""
        return tuple(np.array(ids, np.int32) for ids in self.ids)


class Journal(LineJournal[Settings, Reading | LayerReading]):
    """Settings, and readings by the tensor's name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Settings, Reading | LayerReading, "sensitivity")

    @property
    def readings(self) -> dict[str, Reading]:
        """What tensors do to the output."""
        return {r.name: r for r in self.steps if isinstance(r, Reading)}

    @property
    def layer_readings(self) -> dict[str, LayerReading]:
        """What tensors do to the residual stream after a layer."""
        return {r.name: r for r in self.steps if isinstance(r, LayerReading)}
