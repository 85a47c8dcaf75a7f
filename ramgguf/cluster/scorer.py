"""Sequences scored on the workers of an executor, each of which keeps the models open."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ramgguf.cluster.tasks import EngineKey, EngineRequest, OpenEngine, Task
from ramgguf.cluster.worker_pool import WorkerPool
from ramgguf.gguf.identity import FileIdentity
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.protocol import (
    Detokenize,
    Detokenized,
    Opened,
    Score,
    TokenIds,
    Tokenize,
    Tokenized,
    pack_ids,
    unpack_ids,
)
from ramgguf.llama.scorer import NO_FILES, EngineOptions, LogitsFiles, Window, WindowScores


class RemoteScorer:
    """Models scored together by a pool, one sequence a task."""

    def __init__(
        self,
        pool: WorkerPool,
        models: Sequence[Path],
        options: EngineOptions,
    ) -> None:
        self._pool = pool
        self._label = " with ".join(str(path) for path in reversed(models))
        self._key = EngineKey(tuple(_identity(path) for path in models), options)
        opened = pool.ask(self._task("loading", OpenEngine())).answer
        assert isinstance(opened, Opened)  # what OpenEngine is answered by
        self.opened = opened

    def tokenize(
        self, text: str, *, add_special: bool, control_tokens: bool = False
    ) -> tuple[TokenIds, NDArray[np.int64]]:
        """Return the text's token ids and where each ends in its UTF-8 bytes."""
        request = Tokenize(
            model=0, text=text, add_special=add_special, control_tokens=control_tokens
        )
        found = self._pool.ask(self._task("tokenizing", request)).answer
        assert isinstance(found, Tokenized)
        return unpack_ids(found.ids), unpack_ids(found.ends).astype(np.int64)

    def detokenize(self, ids: TokenIds) -> tuple[bytes, NDArray[np.int64]]:
        """Return the text of the first model's tokens and where each ends in it."""
        request = Detokenize(model=0, ids=pack_ids(ids))
        found = self._pool.ask(self._task("detokenizing", request)).answer
        assert isinstance(found, Detokenized)
        return base64.b64decode(found.text), unpack_ids(found.ends).astype(np.int64)

    def score(
        self,
        windows: Sequence[Window],
        first_target: int,
        *,
        has_reference: bool,
        logits: LogitsFiles = NO_FILES,
    ) -> Iterator[WindowScores]:
        """Yield the windows' scores, as workers finish them."""
        tasks = []
        for window in windows:
            request = Score(
                index=window.index,
                ids=pack_ids(window.ids),
                first_target=first_target,
                has_reference=has_reference,
                reference_logits=_absolute(logits.reference),
                save_logits=_absolute(logits.save),
            )
            tasks.append(self._task(f"sequence {window.index}", request))
        for position, done in self._pool.perform(tasks):
            assert isinstance(done.answer, tuple)
            yield WindowScores(windows[position], done.answer, done.worker.system.cpu)

    def _task(self, what: str, request: EngineRequest) -> Task:
        return self._pool.task(f"{self._label}: {what}", self._key, request)


def _absolute(path: str | None) -> str | None:
    """Return what a worker of another working directory finds the file under."""
    return None if path is None else str(Path(path).absolute())


def _identity(path: Path) -> FileIdentity:
    with open_gguf(path) as file:
        return FileIdentity.of(file)
