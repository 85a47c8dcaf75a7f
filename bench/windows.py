"""Windows of WikiText-2 that a probe runs, and what the unchanged model makes of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ramgguf.core.corpus import default_corpus
from ramgguf.llama.model import Logits
from ramgguf.llama.patched_model import PatchedModel
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.tokens import TokenRequest, draw_sets


@dataclass(frozen=True)
class Text:
    """Windows as long as the probe's context, and the source's logits on them."""

    sequences: tuple[TokenIds, ...]
    reference: tuple[Logits, ...]

    @classmethod
    def of(cls, probe: PatchedModel, n: int, first: int) -> "Text":
        """Return n windows from number `first` on; those of numbers far apart are others."""
        request = TokenRequest(
            encoder="rtn", tokens="text", corpus=default_corpus(), n_ctx=probe.model.n_ctx
        )
        (sequences,) = draw_sets(probe.model, request, (n,), first)
        return cls(sequences, tuple(probe.logits(ids) for ids in sequences))

    def divergence(self, probe: PatchedModel) -> NDArray[np.float64]:
        """Return the KLD of every token as the probe's weights are now, in nats."""
        pairs = zip(self.sequences, self.reference, strict=True)
        return np.concatenate([probe.divergence(ids, logits) for ids, logits in pairs])
