"""Row chunks of tensors, and an ordered map over them on threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Fixed, so that sums are taken over the same chunks for any number of threads.
CHUNK_WEIGHTS = 1 << 19


@dataclass(frozen=True)
class Chunk:
    """Rows start to stop (exclusive) of the tensor with this index."""

    index: int
    start: int
    stop: int


def row_chunks(index: int, n_rows: int, row_length: int) -> Iterator[Chunk]:
    """Yield the chunks of a tensor: whole rows, about CHUNK_WEIGHTS weights each."""
    step = max(1, CHUNK_WEIGHTS // row_length)
    for start in range(0, n_rows, step):
        yield Chunk(index, start, min(start + step, n_rows))


def default_threads() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield function(item) in the order of items, computed by threads with few results waiting.

    The first exception ends the map; work that has not started by then is dropped.
    """
    if threads <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
