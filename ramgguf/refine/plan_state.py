"""A plan's formats as they stand in a refinement, and the KLD of sets of tokens under them."""

import hashlib
from collections.abc import Sequence

import numpy as np

from ramgguf.core.errors import PlanError
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.forward import Change, ForwardRequest, ForwardRunner
from ramgguf.llama.patched_weights import Floats
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.token_statistics import standard_error
from ramgguf.plan.result import FormatChange, KLDChange
from ramgguf.quants.roundtrip import SOURCES


class PlanState:
    """The formats that the next passes run with, and what passes ahead of their time found."""

    def __init__(self, file: GGUFFile, passes: ForwardRunner) -> None:
        self.file = file
        self._passes = passes
        self._formats: dict[str, str] = {}
        self._known: dict[tuple[tuple[Change, ...], bytes], Floats] = {}

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
        changes = self._after(())
        self._run([ForwardRequest(changes, (ids,)) for ids in sequences])
        return np.concatenate([self._known.pop((changes, ids.tobytes())) for ids in sequences])

    def look_ahead(
        self, swaps: Sequence[Sequence[FormatChange]], sequences: Sequence[TokenIds]
    ) -> None:
        """Have the passes of the first swap, and if they are not there yet, run those of all.

        What an earlier look ahead found and nobody asked for is forgotten.
        """
        first, *_ = states = [self._after(swap) for swap in swaps]
        if any((first, ids.tobytes()) not in self._known for ids in sequences):
            self._known.clear()
            self._run([ForwardRequest(changes, (ids,)) for changes in states for ids in sequences])

    def _after(self, swap: Sequence[FormatChange]) -> tuple[Change, ...]:
        """Return what differs from the original after a swap."""
        formats = self._formats | {c.name: c.after for c in swap}
        for change in swap:
            if change.after == self.file.tensor(change.name).type_name:
                del formats[change.name]
        return tuple(sorted(formats.items()))

    def _run(self, wanted: Sequence[ForwardRequest]) -> None:
        """Keep what those of the passes find that were not run yet, each of one sequence."""
        new = [w for w in wanted if (w.changes, w.sequences[0].tobytes()) not in self._known]
        for position, found in self._passes.run(new):
            one = new[position]
            self._known[one.changes, one.sequences[0].tobytes()] = found.kld


class TokenSet:
    """One set of sequences, and the KLD of each token as the plan stands."""

    def __init__(self, sequences: Sequence[TokenIds], planned: PlanState) -> None:
        self._sequences, self._planned = sequences, planned
        self.before: Floats | None = None
        self.now: Floats | None = None

    def divergence(self) -> Floats:
        """Return the KLD of every token with the formats that are put."""
        return self._planned.divergence(self._sequences)

    def look_ahead(self, swaps: Sequence[Sequence[FormatChange]]) -> None:
        """Run the passes of the first swap, side by side with those that may come after it."""
        self._planned.look_ahead(swaps, self._sequences)

    def current(self) -> Floats:
        """Return the KLD of every token as the plan stands, whose formats must be put."""
        if self.now is None:
            self.now = self.divergence()
        if self.before is None:
            self.before = self.now
        return self.now

    def change(self) -> KLDChange:
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
