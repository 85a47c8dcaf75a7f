"""What readings cost, and which of them fit the time that was asked for.

Everything counts, from the start of the run: copying and loading the model, probing it, drawing
tokens, the original's passes, encoding, and the pass that shows that the copy is whole again.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ramgguf.core.units import format_seconds
from ramgguf.gguf.reader import TensorInfo
from ramgguf.llama.forward import ForwardRequest, ForwardRunner
from ramgguf.llama.tokens import TokenRequest

Clock = Callable[[], float]
FormatOf = Callable[[TensorInfo], str]
W = TypeVar("W")

_DRAWN = 16  # tokens that the drawing of a sequence is judged by
# By how much of its time a run may be late before it stops reading. What is left until 1.25 is for
# the pass that is under way, and for the end.
LATE = 1.1


@dataclass
class Timer:
    """The time of a run: what was asked for, and what has passed since its start.

    limit is what the run keeps to: the seconds asked for, or the least that it can take.
    """

    seconds: float
    clock: Clock = time.perf_counter
    start: float = field(default=math.nan)
    limit: float = field(default=math.nan)

    def __post_init__(self) -> None:
        if math.isnan(self.start):
            self.start = self.clock()
        self.limit = self.seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def has_time(self, seconds: float) -> bool:
        """Return whether what takes so many seconds more ends in time, or nearly so."""
        return self.spent + seconds <= LATE * self.limit


@dataclass(frozen=True)
class Costs:
    """Measured seconds: drawing a sequence, a pass over one, and encoding, for each weight.

    reload is what it takes to begin passes at another layer, None where that cannot be.
    """

    drawing: float
    each: float
    encoding: float
    n_workers: int = 1
    reload: float | None = None

    def reading(self, tensor: TensorInfo, n_sequences: int, share: float) -> float:
        """Return what a reading of the tensor takes of the run's time, by this share of passes."""
        passes = n_sequences * self.each * share
        return (self.encoding * tensor.n_weights + passes) / self.n_workers


def probe(
    passes: ForwardRunner,
    request: TokenRequest,
    tensors: Sequence[TensorInfo],
    format_of: FormatOf,
    clock: Clock,
) -> Costs:
    """Return what the parts cost here, from one pass of each kind.

    They are over random tokens: those of the model itself take as long to draw as many passes.
    """
    (ids,) = passes.draw(replace(request, tokens="random", sources=()), range(1))
    each = passes.seconds(ids)
    start, drawn = clock(), min(_DRAWN, request.n_ctx - 1)
    if request.self_share:
        short = replace(request, tokens="self", sources=(), n_ctx=drawn + 1)
        passes.draw(short, range(1))
    drawing = (clock() - start) * (request.n_ctx - 1) / drawn * (request.self_share or 1.0)
    middle = sorted(tensors, key=lambda t: t.n_weights)[len(tensors) // 2]
    start = clock()
    list(passes.run([ForwardRequest(((middle.name, format_of(middle)),), (ids,))]))
    encoding = max(0.0, clock() - start - each) / middle.n_weights
    return Costs(drawing, each, encoding, passes.n_workers, passes.reload_seconds)


def choose(
    works: Sequence[W],
    seconds_of: Callable[[W], float],
    timer: Timer,
    announce: Callable[[str], None],
) -> tuple[W, float]:
    """Return the first that fits the time, and its seconds; works come with the best first.

    seconds_of tells what is still to come. Where not even the last fits, announce gets the least
    time, to which the run then keeps.
    """
    left = timer.limit - timer.spent
    for work in works:
        seconds = seconds_of(work)
        if seconds <= left:
            return work, seconds
    least = timer.spent + seconds
    announce(
        f"{format_seconds(timer.seconds)} are too short: the least possible here is about "
        f"{format_seconds(least)}, loading and probing included"
    )
    timer.limit = least
    return works[-1], seconds


def spread_order(n: int) -> list[int]:
    """Return 0 … n − 1 so that any first few of them are spread evenly: 0, middle, quarters …"""
    order: dict[int, None] = {}
    parts = 1
    while len(order) < n:
        order.update(dict.fromkeys(i * n // parts for i in range(parts)))
        parts *= 2
    return list(order)
