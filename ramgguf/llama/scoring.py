"""Score one sequence with one or several models in this process, chunk by chunk."""

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ramgguf import _core
from ramgguf.core.errors import EngineError
from ramgguf.llama.logits_file import LEAST_LOG_P, LogitsFile, write_rows
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

    def compare_stored(self, log_p: Logits, candidate: Logits, targets: TokenIds) -> Records:
        """Return compare's records for a reference's log p from a file, as llama.cpp defines them.

        KLD = Σ p (log p − log q) over tokens with log p > −16, and p is not normalized anew
        (source: llama.cpp, tools/perplexity/perplexity.cpp, log_softmax with base_log_prob).
        """
        rows = np.arange(len(targets))
        target_log_p = log_p[rows, targets].astype(np.float64)
        reference = np.where(log_p > LEAST_LOG_P, log_p, np.float32(-np.inf))
        reference[rows, targets] = target_log_p  # a target needs a probability
        found = self.compare(reference, candidate, targets)
        # compare divides by the sum of what is there: that is taken back, and so is a target that
        # llama.cpp leaves out.
        log_sum = found["reference"]["log_sum_exp"]
        kld = np.exp(log_sum) * (found["kld"] + log_sum)
        term = np.exp(target_log_p) * (target_log_p + found["candidate"]["nll"])
        found["kld"] = kld - np.where(target_log_p > LEAST_LOG_P, 0.0, term)
        found["reference"]["nll"] = -target_log_p
        found["reference"]["target_p"] = np.exp(target_log_p)
        found["delta_p"] = found["candidate"]["target_p"] - np.exp(target_log_p)
        return found

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


@dataclass(frozen=True)
class StoredWindow:
    """A window of a file of logits."""

    file: LogitsFile
    index: int

    def read(self, first: int, last: int) -> Logits:
        """Return log p for positions first … last − 1."""
        return self.file.log_probabilities(self.index, first, last)

    def write(self, first: int, logits: Logits) -> None:
        """Write the logits of the positions from first on."""
        write_rows(self.file, self.index, first, logits)


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
    stored: StoredWindow | None = None,
    saved: StoredWindow | None = None,
    on_model: Callable[[int], None] = lambda _: None,
) -> list[SequenceRecords]:
    """Return the records of targets first_target … of ids, for each of the models.

    With has_reference, models[0] is the reference of the others: each chunk is decoded by all in
    turn, so its logits are compared where llama.cpp left them and none are stored. on_model is
    called with the model that is about to decode. A model that is listed twice, as its own
    reference, decodes once. Models must share the tokenizer and n_batch. stored has the reference's
    probabilities instead; saved takes the logits of models[0].
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
        log_p = stored.read(first_row, last_row) if stored and len(targets) else None
        found_before: dict[int, Logits] = {}
        for number, (model, out) in enumerate(zip(models, collected, strict=True)):
            on_model(number)
            began, decoded = time.perf_counter(), model.decode_seconds
            logits = found_before.get(id(model))
            if logits is None:
                logits = model.decode(ids[start:end], first_output=first_row - start)
                found_before[id(model)] = logits = logits[: len(targets)]
            if number == 0 and saved is not None and len(targets):
                try:
                    saved.write(first_row, logits)
                except EngineError as e:
                    raise EngineError(f"{model.path}: {e}") from None
            if log_p is not None:
                found = row_pass.compare_stored(log_p, logits, targets)
                out.divergences.append(found)
                out.scores.append(found["candidate"])
            elif len(targets) and has_reference and reference is not None:
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
