"""The interface of forward passes over a model some of whose tensors are quantized.

A runner executes them: LocalRunner in this process, RemoteRunner on the workers of an executor.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ramgguf.core.errors import PlanError
from ramgguf.llama.model import Logits
from ramgguf.llama.patched_weights import Floats
from ramgguf.llama.protocol import TokenIds
from ramgguf.llama.tokens import TokenRequest

# Of a sequence's logits, what is hashed to tell whether two machines compute alike.
FINGERPRINT_STRIDE = 64

Change = tuple[str, str]  # a tensor's name, and the format that it gets


@dataclass(frozen=True)
class ForwardRequest:
    """Sequences to decode while these tensors have these formats, all others their own.

    start is the layer at which a pass may begin: no change acts before it. The result is the same;
    requests in the order of their starts take the least time. end is the layer after which the pass
    ends, with the error of the residual stream there; None: with the KLD of the output.
    """

    changes: tuple[Change, ...]
    sequences: tuple[TokenIds, ...]
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class ForwardResult:
    """KL(original ‖ changed) of every token in nats, sequence after sequence; the changes' NMSE.

    Of a pass that ends at a layer there is no KLD, but errors: of every token, the squared change
    of the residual stream divided by its square; None where llama.cpp's graph does not name it.
    why_whole says why the pass began at the first layer instead of the start that was asked for.
    """

    kld: Floats
    nmse: tuple[float, ...]
    why_whole: str | None = None
    errors: Floats | None = None


class ForwardRunner(Protocol):
    """Forward passes over one model, with one context length, encoder and number of threads."""

    @property
    def n_workers(self) -> int:
        """How many passes run at the same time, as far as is known."""

    @property
    def n_vocab(self) -> int:
        """Tokens in the model's vocabulary."""

    @property
    def build(self) -> str:
        """Which llama.cpp runs."""

    @property
    def cpus(self) -> tuple[str, ...]:
        """The names of the CPUs that have computed so far, sorted."""

    @property
    def reload_seconds(self) -> float | None:
        """What it takes to begin at another layer; None where passes begin at the first only."""

    def draw(self, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
        """Return the sequences of these numbers (tokens.draw_sequences)."""

    def draw_sets(
        self, request: TokenRequest, sizes: Sequence[int], first: int
    ) -> tuple[tuple[TokenIds, ...], ...]:
        """Return sets of sequences (tokens.draw_sets)."""

    def seconds(self, ids: TokenIds) -> float:
        """Return how long one pass over the sequence takes, its comparison included."""

    def prepare(self, sequences: Sequence[TokenIds]) -> str:
        """Return the fingerprint of what the original makes of the sequences.

        The sequences of later passes are among these.
        """

    def run(self, wanted: Sequence[ForwardRequest]) -> Iterator[tuple[int, ForwardResult]]:
        """Yield, in any order, the position in `wanted` of a pass and what it found."""


def fingerprint(logits: Logits) -> str:
    """Return what tells the logits of a sequence from those of other kernels: a hash of some rows.

    Rows depend on all weights; another kernel, build or file changes their last bits.
    """
    digest = hashlib.sha256(np.ascontiguousarray(logits[::FINGERPRINT_STRIDE]).tobytes())
    digest.update(np.ascontiguousarray(logits[-1]).tobytes())
    return digest.hexdigest()[:16]


def require_same_logits(
    passes: ForwardRunner, sequences: Sequence[TokenIds], begun_with: str | None, journal: Path
) -> None:
    """Raise PlanError if the original's fingerprint is not that with which the journal was begun.

    None, of journals of versions that took none, is any. The passes are prepared for the sequences.
    """
    if passes.prepare(sequences) != begun_with and begun_with is not None:
        raise PlanError(
            f"{journal} was begun where llama.cpp computes other logits (another build, CPU or "
            "number of threads); go on there, or remove it to start anew"
        )


def joint_fingerprint(parts: Sequence[str]) -> str:
    """Return one fingerprint for several sequences."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
