"""ForwardRunner on the workers of an executor, each of which keeps a copy of the model open."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ramgguf.cluster.tasks import RunnerKey, RunnerRequest, Task
from ramgguf.cluster.worker_pool import PassCrashError, WorkerPool
from ramgguf.core.errors import EngineError
from ramgguf.core.units import format_count
from ramgguf.gguf.identity import FileIdentity
from ramgguf.gguf.reader import GGUFFile
from ramgguf.llama.forward import ForwardRequest, ForwardResult, joint_fingerprint
from ramgguf.llama.protocol import TokenIds, pack_ids, unpack_ids
from ramgguf.llama.runner_protocol import (
    AboutRunner,
    Compare,
    Compared,
    DrawIds,
    DrawnIds,
    Prepare,
    Prepared,
    RunnerOpened,
    unpack_float64,
)
from ramgguf.llama.tokens import TokenRequest, batches
from ramgguf.quants.imatrix import Imatrix, ImportanceSource


class RemoteRunner:
    """Forward passes on the workers of a pool.

    folder is where workers copy the model to; None takes their temporary folder. With a stand-in,
    they write one of that format there.
    """

    def __init__(
        self,
        pool: WorkerPool,
        file: GGUFFile,
        *,
        n_ctx: int,
        threads: int,
        encoder: str,
        imatrix: Imatrix | None,
        folder: Path | None,
        stand_in: str | None = None,
    ) -> None:
        self._pool = pool
        self._key = RunnerKey(
            model=FileIdentity.of(file),
            n_ctx=n_ctx,
            n_threads=threads,
            encoder=encoder,
            imatrix=_absolute(imatrix),
            folder=None if folder is None else str(folder.absolute()),
            stand_in=stand_in,
        )
        self._prepared: tuple[str, ...] = ()
        self._fingerprints: dict[str, tuple[str, str]] = {}
        self._crashed: str | None = None  # by a pass that began at a later layer

    @property
    def n_workers(self) -> int:
        """How many passes run at the same time, as far as the executor tells."""
        return self._pool.n_workers

    @cached_property
    def _opened(self) -> RunnerOpened:
        answer = self._pool.ask(self._task("loading", AboutRunner())).answer
        assert isinstance(answer, RunnerOpened)  # what AboutRunner is answered by
        return answer

    @property
    def n_vocab(self) -> int:
        """Tokens in the model's vocabulary."""
        return self._opened.n_vocab

    @property
    def build(self) -> str:
        """Which llama.cpp runs, on every worker."""
        return self._opened.system.build

    @property
    def cpus(self) -> tuple[str, ...]:
        """The names of the CPUs that have computed so far, sorted."""
        return self._pool.cpus

    @property
    def reload_seconds(self) -> float | None:
        """What it takes to begin at another layer; None where passes begin at the first only."""
        return self._opened.reload_seconds

    def draw(self, request: TokenRequest, indices: Sequence[int]) -> tuple[TokenIds, ...]:
        """Return the sequences of these numbers, drawn in the batches of one machine."""
        tasks = [
            self._draw(request, f"sequences {batch[0]} to {batch[-1]}", indices=batch)
            for batch in batches(indices)
        ]
        drawn: dict[int, list[TokenIds]] = {}
        for position, done in self._pool.perform(tasks):
            assert isinstance(done.answer, DrawnIds)
            drawn[position] = [unpack_ids(ids) for ids in done.answer.ids]
        return tuple(ids for i in range(len(tasks)) for ids in drawn[i])

    def draw_sets(
        self, request: TokenRequest, sizes: Sequence[int], first: int
    ) -> tuple[tuple[TokenIds, ...], ...]:
        """Return sets of sequences; those of a text are drawn together, so as not to overlap."""
        if request.tokens == "text":
            task = self._draw(request, "sets of sequences", sizes=tuple(sizes), first=first)
            answer = self._pool.ask(task).answer
            assert isinstance(answer, DrawnIds)
            drawn = tuple(unpack_ids(ids) for ids in answer.ids)
        else:
            drawn = self.draw(request, range(first, first + sum(sizes)))
        ends = np.cumsum(sizes)
        return tuple(drawn[end - size : end] for end, size in zip(ends, sizes, strict=True))

    def seconds(self, ids: TokenIds) -> float:
        """Return how long one pass over the sequence takes on a worker."""
        answer = self._pool.ask(self._task("an unchanged pass", Compare(ids=(pack_ids(ids),))))
        assert isinstance(answer.answer, Compared)
        return answer.answer.seconds

    def prepare(self, sequences: Sequence[TokenIds]) -> str:
        """Return the fingerprint of what the original makes of the sequences."""
        self._prepared = tuple(pack_ids(ids) for ids in sequences)
        tasks = [
            self._task(f"sequence {k}, unchanged", Prepare(ids=(ids,)))
            for k, ids in enumerate(self._prepared)
        ]
        for position, done in self._pool.perform(tasks):
            assert isinstance(done.answer, Prepared)
            found = done.answer.fingerprints[0]
            self._check(self._prepared[position], found, done.worker.name)
        return joint_fingerprint([self._fingerprints[ids][0] for ids in self._prepared])

    def run(self, wanted: Sequence[ForwardRequest]) -> Iterator[tuple[int, ForwardResult]]:
        """Yield what passes find, as workers finish them.

        Where llama.cpp crashes in a pass that begins at a later layer, all others begin at the
        first.
        """
        found: set[int] = set()
        if self._crashed is None:
            try:
                for position, result in self._run(wanted, range(len(wanted))):
                    found.add(position)
                    yield position, result
                return
            except PassCrashError as e:
                if not any(one.start for one in wanted):
                    raise
                self._crashed = str(e)
        left = [i for i in range(len(wanted)) if i not in found]
        whole = [replace(wanted[i], start=0) for i in left]
        for position, result in self._run(whole, left):
            why = self._crashed if wanted[position].start else None
            yield position, replace(result, why_whole=why)

    def _run(
        self, wanted: Sequence[ForwardRequest], positions: Sequence[int]
    ) -> Iterator[tuple[int, ForwardResult]]:
        tasks = [self._compare(one) for one in wanted]
        for position, done in self._pool.perform(tasks):
            request, answer = tasks[position].request, done.answer
            assert isinstance(request, Compare)
            assert isinstance(answer, Compared)
            for ids, found in zip(request.ids, answer.fingerprints, strict=True):
                self._check(ids, found, done.worker.name)
            kld = unpack_float64(answer.kld)
            errors = None if answer.errors is None else unpack_float64(answer.errors)
            yield positions[position], ForwardResult(kld, answer.nmse, answer.why_whole, errors)

    def _compare(self, wanted: ForwardRequest) -> Task:
        ids = tuple(pack_ids(part) for part in wanted.sequences)
        numbers = [str(self._prepared.index(i)) for i in ids if i in self._prepared]
        changed = f"{format_count(len(wanted.changes), 'tensor')} changed"
        if len(wanted.changes) == 1:
            changed = "{} as {}".format(*wanted.changes[0])
        label = f"{changed}, sequence {' and '.join(numbers) or '?'}"
        request = Compare(
            ids=ids,
            changes=wanted.changes,
            prepared=self._prepared,
            start=wanted.start,
            end=wanted.end,
        )
        return self._task(label, request)

    def _draw(
        self,
        request: TokenRequest,
        what: str,
        *,
        indices: tuple[int, ...] = (),
        sizes: tuple[int, ...] = (),
        first: int = 0,
    ) -> Task:
        corpus = request.corpus
        drawing = DrawIds(
            tokens=request.tokens,
            n_ctx=request.n_ctx,
            seed=request.seed,
            indices=indices,
            sizes=sizes,
            first=first,
            name="" if corpus is None else corpus.name,
            text=None if corpus is None else corpus.text,
        )
        return self._task(f"drawing {what}", drawing)

    def _task(self, label: str, request: RunnerRequest) -> Task:
        return self._pool.task(f"{self._key.model.path}: {label}", self._key, request)

    def _check(self, ids: str, found: str, worker: str) -> None:
        """Raise EngineError unless the unchanged model gives the same logits on every worker."""
        expected, first = self._fingerprints.setdefault(ids, (found, worker))
        if found != expected:
            raise EngineError(
                f"worker {worker} computes other logits of the unchanged model than {first}; "
                "their results must not be mixed: take workers of one kind, with the same file"
            )


def _absolute(imatrix: Imatrix | None) -> ImportanceSource | None:
    """Return where workers find the importance matrix, and what it must be."""
    if imatrix is None:
        return None
    source = imatrix.source
    hessian = source.hessian_path
    paths = {
        "path": str(Path(source.path).absolute()),
        "hessian_path": str(Path(hessian).absolute()) if hessian else None,
    }
    return source.model_copy(update=paths)
