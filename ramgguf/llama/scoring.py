"""Score one sequence with one or several models in this process, chunk by chunk."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ramgguf import _core
from ramgguf.llama.model import LlamaModel, Logits
from ramgguf.llama.protocol import TokenIds

Records = npt.NDArray[np.void]


class RowPass:
    """The C++ pass over rows of logits, spread over threads; the rows' order is kept."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._pool = ThreadPoolExecutor(n_threads) if n_threads > 1 else None

    def score(self, logits: Logits, targets: TokenIds) -> Records:
        """Return _core.score_logits of the rows."""
        return self._spread(lambda rows: _core.score_logits(logits[rows], targets[rows]), targets)

    def compare(self, reference: Logits, candidate: Logits, targets: TokenIds) -> Records:
        """Return _core.compare_logits of the rows."""
        return self._spread(
            lambda rows: _core.compare_logits(reference[rows], candidate[rows], targets[rows]),
            targets,
        )

    def _spread(self, work: Callable[[slice], Records], targets: TokenIds) -> Records:
        n = len(targets)
        if self._pool is None or n < 2 * self.n_threads:
            return work(slice(0, n))
        bounds = [n * i // self.n_threads for i in range(self.n_threads + 1)]
        parts = self._pool.map(work, [slice(a, b) for a, b in itertools.pairwise(bounds)])
        return np.concatenate(list(parts))


@dataclass
class SequenceRecords:
    """Per scored target, in order: the model's own records, and those against the reference."""

    scores: Records
    divergences: Records | None
    seconds: float
    decode_seconds: float


@dataclass
class _Collected:
    scores: list[Records] = field(default_factory=list)
    divergences: list[Records] = field(default_factory=list)
    seconds: float = 0.0
    decode_seconds: float = 0.0


def score_sequence(
    models: Sequence[LlamaModel],
    ids: TokenIds,
    first_target: int,
    row_pass: RowPass,
    *,
    has_reference: bool,
    on_model: Callable[[int], None] = lambda _: None,
) -> list[SequenceRecords]:
    """Return the records of targets first_target … of ids, for each of the models.

    With has_reference, models[0] is the reference of the others: each chunk is decoded by all in
    turn, so its logits are compared where llama.cpp left them and none are stored. on_model is
    told which model is about to decode. A model that is listed twice, as its own reference, decodes
    once. Models must share the tokenizer and n_batch.
    """
    collected = [_Collected() for _ in models]
    for model in models:
        model.clear()
    for start, end in models[0].chunks(len(ids)):
        # Row i of the logits predicts target i + 1; the last token of a sequence predicts none.
        first_row = max(start, first_target - 1)
        last_row = min(end, len(ids) - 1)
        targets = ids[first_row + 1 : last_row + 1]
        reference: Logits | None = None
        found_before: dict[int, Logits] = {}
        for number, (model, out) in enumerate(zip(models, collected, strict=True)):
            on_model(number)
            began, decoded = time.perf_counter(), model.decode_seconds
            logits = found_before.get(id(model))
            if logits is None:
                logits = model.decode(ids[start:end], first_output=first_row - start)
                found_before[id(model)] = logits = logits[: len(targets)]
            if len(targets) and has_reference and reference is not None:
                found = row_pass.compare(reference, logits, targets)
                out.divergences.append(found)
                out.scores.append(found["candidate"])
            elif len(targets):
                out.scores.append(row_pass.score(logits, targets))
            if number == 0 and has_reference:
                reference = logits
            out.seconds += time.perf_counter() - began
            out.decode_seconds += model.decode_seconds - decoded
    return [
        SequenceRecords(
            scores=np.concatenate(c.scores),
            divergences=np.concatenate(c.divergences) if c.divergences else None,
            seconds=c.seconds,
            decode_seconds=c.decode_seconds,
        )
        for c in collected
    ]
