"""Row chunks of tensors, and an ordered map over them on threads."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")

# Fixed, so that sums are taken over the same chunks for any number of threads. The bytes of a
# chunk, and what is made of them, stay in the second cache.
CHUNK_WEIGHTS = 1 << 20
BATCH_RUNS = 4  # what a thread takes at once
# The sample of a tensor that selects the formats to measure.
SAMPLE_SHARE, SAMPLE_WEIGHTS, SAMPLE_CHUNKS = 1 / 64, 1 << 16, 16


class Rows(Protocol):
    """What chunks are made of: a tensor of n_rows rows."""

    @property
    def n_rows(self) -> int: ...
    @property
    def row_length(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows start to stop (exclusive) of the tensor with this index."""

    index: int
    start: int
    stop: int


Run = list[Chunk]  # what is read, worked on and written at one go


def runs(tensors: Iterable[Rows]) -> Iterator[Run]:
    """Yield all chunks in order: whole rows, about CHUNK_WEIGHTS weights each.

    Chunks of small tensors come together, as many as are no larger than one of a large tensor.
    """
    return _together(
        (Chunk(index, start, min(start + step, tensor.n_rows)), tensor.row_length)
        for index, tensor in enumerate(tensors)
        for step in (max(1, CHUNK_WEIGHTS // tensor.row_length),)
        for start in range(0, tensor.n_rows, step)
    )


def sample(tensors: Iterable[Rows]) -> Iterator[Run]:
    """Yield chunks of SAMPLE_CHUNKS ranges of rows spread over each tensor, of few weights in all.

    They hold SAMPLE_SHARE of the weights, SAMPLE_WEIGHTS at least: small tensors are taken whole.
    Small chunks come together, as in runs.
    """
    return _together(
        (chunk, tensor.row_length)
        for index, tensor in enumerate(tensors)
        for chunk in _sample_of(index, tensor.n_rows, tensor.row_length)
    )


def _sample_of(index: int, n_rows: int, row_length: int) -> Iterator[Chunk]:
    wanted = max(SAMPLE_WEIGHTS, int(SAMPLE_SHARE * n_rows * row_length))
    step = max(1, -(-wanted // (SAMPLE_CHUNKS * row_length)))
    n_chunks = min(SAMPLE_CHUNKS, -(-n_rows // step))
    starts = [i * n_rows // n_chunks for i in range(n_chunks)]
    for start, end in pairwise([*starts, n_rows]):
        yield Chunk(index, start, min(start + step, end))


def _together(chunks: Iterable[tuple[Chunk, int]]) -> Iterator[Run]:
    """Yield the chunks, given with their row length, in runs of up to CHUNK_WEIGHTS weights."""
    run: Run = []
    n_weights = 0
    for chunk, row_length in chunks:
        own = (chunk.stop - chunk.start) * row_length
        if run and n_weights + own > CHUNK_WEIGHTS:
            yield run
            run, n_weights = [], 0
        run.append(chunk)
        n_weights += own
    if run:
        yield run


def by_expert(start: int, stop: int, rows_per_expert: int) -> Iterator[tuple[int, slice]]:
    """Yield the experts whose rows are among start to stop, each with these, counted from start."""
    at = start
    while at < stop:
        expert = at // rows_per_expert
        end = min(stop, (expert + 1) * rows_per_expert)
        yield expert, slice(at - start, end - start)
        at = end


def map_chunks(function: Callable[[Chunk], R], runs: Iterable[Run], threads: int) -> Iterator[R]:
    """Yield function(chunk) for the chunks of all runs, in order, computed by threads."""
    for results in map_runs(lambda run: list(map(function, run)), runs, threads):
        yield from results


def map_runs(function: Callable[[Run], R], runs: Iterable[Run], threads: int) -> Iterator[R]:
    """Yield function(run) for all runs, in order, computed by threads."""
    left = iter(runs)
    batches = iter(lambda: list(islice(left, BATCH_RUNS)), [])
    for results in ordered_map(lambda batch: list(map(function, batch)), batches, threads):
        yield from results


class Buffers(threading.local):
    """Memory that each thread uses for one chunk after the other: fresh pages are not free."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def take(self, purpose: str, n_bytes: int) -> NDArray[np.uint8]:
        """Return n_bytes that are this thread's until it takes memory for that purpose again."""
        buffer = self._buffers.get(purpose)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._buffers[purpose] = np.empty(n_bytes, np.uint8)
        return buffer[:n_bytes]


def default_threads() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield function(item) in the order of items, computed by threads with few results waiting.

    Each thread has one core: matrix products in it do not start threads of their own, which would
    wait for one another. The first exception ends the map; work that has not started by then is
    dropped.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield from _ordered_map(function, items, threads)


def _ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
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
