"""A plan's formats as they stand in a refinement, and the KLD of sets of tokens under them."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ramgguf.engine.wire import TokenIds
from ramgguf.errors import PlanError
from ramgguf.gguf_io import GGUFFile
from ramgguf.passes import Change, Passes, Wanted
from ramgguf.refinements import KLDChange
from ramgguf.simulation import SOURCES
from ramgguf.token_statistics import standard_error
from ramgguf.trial_copy import Floats


class PlanInPasses:
    """The formats that the next passes run with."""

    def __init__(self, file: GGUFFile, passes: Passes) -> None:
        self.file = file
        self._passes = passes
        self._formats: dict[str, str] = {}

    def put(self, name: str, format_name: str) -> None:
        """Give the tensor a format from now on; raises PlanError where it cannot be simulated."""
        own = self.file.tensor(name).type_name
        if format_name == own:
            self._formats.pop(name, None)
        elif own in SOURCES:
            self._formats[name] = format_name
        else:
            raise PlanError(f"{name} is {own}; refinement needs a model in F32, F16 or BF16")

    def divergence(self, sequences: Sequence[TokenIds]) -> Floats:
        """Return the KLD of every token of the sequences, each decoded by a pass of its own."""
        changes: tuple[Change, ...] = tuple(sorted(self._formats.items()))
        wanted = [Wanted(changes, (ids,)) for ids in sequences]
        found = dict(self._passes.run(wanted))
        return np.concatenate([found[k].kld for k in range(len(wanted))])


class TokenSet:
    """One set of sequences, and the KLD of each token as the plan stands."""

    def __init__(self, sequences: Sequence[TokenIds], planned: PlanInPasses) -> None:
        self._sequences, self._planned = sequences, planned
        self.before: Floats | None = None
        self.now: Floats | None = None

    def divergence(self) -> Floats:
        """Return the KLD of every token with the formats that are put."""
        return self._planned.divergence(self._sequences)

    def current(self) -> Floats:
        """Return the KLD of every token as the plan stands, whose formats must be put."""
        if self.now is None:
            self.now = self.divergence()
        if self.before is None:
            self.before = self.now
        return self.now

    def told(self) -> KLDChange:
        """Return the KLD as the plan was and as it stands."""
        now = self.current()
        before = now if self.before is None else self.before
        return KLDChange(
            n_tokens=len(now),
            sha256=hashlib.sha256(b"".join(ids.tobytes() for ids in self._sequences)).hexdigest(),
            before=max(0.0, float(before.mean())),
            after=max(0.0, float(now.mean())),
            error=standard_error(now - before),
        )
