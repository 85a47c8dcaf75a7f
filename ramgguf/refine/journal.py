"""The file to which a refinement writes each trial, and from which it goes on."""

from functools import cached_property
from pathlib import Path

import numpy as np

from ramgguf.core.documents import FrozenModel, NonNegativeFloat, Number
from ramgguf.core.line_journal import LineJournal
from ramgguf.llama.protocol import TokenIds
from ramgguf.plan.result import FormatChange


class RefineSettings(FrozenModel):
    """What a refinement was settled to do; ids are of proposal, acceptance and report.

    sample_sha256 is that of the model, None in journals of versions that did not take it.
    fingerprint is of the unchanged model's logits: where another one is found, numbers differ.
    """

    plan_sha256: str
    sample_sha256: str | None = None
    budget: int
    tokens: str
    seed: int
    ids: tuple[tuple[tuple[int, ...], ...], ...]
    fingerprint: str | None = None
    promise: str

    @cached_property
    def sets(self) -> tuple[tuple[TokenIds, ...], ...]:
        """The token ids: per set, one array per sequence."""
        return tuple(tuple(np.array(ids, np.int32) for ids in part) for part in self.ids)


class Paired(FrozenModel):
    """A mean difference of KLD in nats per token, and its standard error."""

    change: Number
    error: NonNegativeFloat


class Trial(FrozenModel):
    """A swap that was tried; accepting is None where the proposal tokens were against it."""

    swap: tuple[FormatChange, ...]
    proposing: Paired
    accepting: Paired | None
    taken: bool


class RefineJournal(LineJournal[RefineSettings, Trial]):
    """The settings of a refinement, and its trials in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, RefineSettings, Trial, "refinement")
