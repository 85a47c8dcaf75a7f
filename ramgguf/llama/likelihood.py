"""Log-likelihoods of continuations; what one has in common with the one before is decoded once."""

import numpy as np

from ramgguf.core.errors import EngineError
from ramgguf.llama.model import LlamaModel
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.scoring import RowPass


class LikelihoodScorer:
    """Scores sequences of one model, whose context holds the last one."""

    def __init__(self, model: LlamaModel, row_pass: RowPass) -> None:
        self._model, self._row_pass = model, row_pass
        self._held = np.empty(0, np.int32)

    def score(self, ids: TokenIds, n_scored: int) -> tuple[float, bool]:
        """Return log p of the last n_scored tokens given those before, and whether all are greedy.

        Natural logarithm. Raises EngineError when it does not fit, or logits are NaN.
        """
        first = len(ids) - n_scored  # the first target, which the token before it predicts
        if not 0 < first < len(ids):
            raise EngineError(f"{n_scored} of {len(ids)} tokens cannot be scored: one must precede")
        n = min(len(self._held), first - 1)
        differs = np.flatnonzero(self._held[:n] != ids[:n])
        kept = self._model.rewind(int(differs[0]) if len(differs) else n)
        self._held = np.empty(0, np.int32)  # until all is decoded
        total, greedy = 0.0, True
        for start in range(kept, len(ids) - 1, self._model.n_batch):
            end = min(start + self._model.n_batch, len(ids) - 1)
            first_row = max(start, first - 1)
            logits = self._model.decode(ids[start:end], first_output=min(first_row, end) - start)
            if first_row < end:
                targets = ids[first_row + 1 : end + 1]
                found = self._row_pass.score(logits, targets)
                if found["broken"].any():
                    raise EngineError(f"{self._model.path}: logits that are NaN or infinite")
                total -= float(found["nll"].sum())
                greedy = greedy and bool((found["top"] == targets).all())
        self._held = ids[:-1].copy()
        return total, greedy
