"""The parent's side of the engine: start the worker, ask, and say what happened when it dies."""

import base64
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from ramgguf.core.closing import Closing
from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.llama.child import Child, ChildDiedError, describe_exit, quoted
from ramgguf.llama.kept import KeptFile
from ramgguf.llama.kind import ModelKind
from ramgguf.llama.protocol import (
    Answer,
    Collect,
    Collected,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Failed,
    Generate,
    Generated,
    Likelihood,
    Likelihoods,
    Open,
    Opened,
    ResponseAdapter,
    Score,
    Scored,
    Started,
    TokenIds,
    Tokenize,
    Tokenized,
    pack_ids,
    unpack_ids,
)

T = TypeVar("T")
A = TypeVar("A", bound=Answer)

_WORKER: str | Sequence[str] = "ramgguf.llama.worker"


class ModelError(EngineError):
    """llama.cpp refused a model, or crashed: which model, in which sequence (None: loading)."""

    def __init__(self, model: int, index: int | None, message: str) -> None:
        super().__init__(message)
        self.model = model
        self.index = index


class WrongKindError(ModelError):
    """The model is of a kind that was not to be run: which one."""

    def __init__(self, model: int, index: int | None, message: str, kind: ModelKind) -> None:
        super().__init__(model, index, message)
        self.kind = kind


class CrashError(ModelError):
    """The worker process ended by itself; code is its exit status, negative for a signal."""

    def __init__(self, model: int, index: int | None, message: str, code: int | None) -> None:
        super().__init__(model, index, message)
        self.code = code


def with_kernels(run: Callable[[bool], T], safe_kernels: bool | None = None) -> T:
    """Return run(safe_kernels); None is False, and True where llama.cpp's repacked kernels crash.

    They do on some CPUs. Raises what run raises.
    """
    if safe_kernels is not None:
        return run(safe_kernels)
    try:
        return run(False)
    except CrashError:
        return run(True)


class Engine(Closing):
    """Models loaded in a child process. Use as a context manager; leaving it ends the child.

    With embeds, models embed texts instead of predicting tokens. Raises ModelError when llama.cpp
    refuses a model, WrongKindError for one of another kind, CrashError when it crashes.
    """

    def __init__(
        self,
        models: Sequence[Path],
        *,
        n_ctx: int,
        n_threads: int,
        safe_kernels: bool = False,
        verbose: bool = False,
        embeds: bool = False,
    ) -> None:
        self._paths = tuple(models)
        self._safe_kernels = safe_kernels
        self._at = Started(model=0, index=None)
        self._child = Child(_WORKER, on_stderr=sys.stderr.write if verbose else lambda _: None)
        request = Open(
            models=tuple(str(p) for p in models),
            n_ctx=n_ctx,
            n_threads=n_threads,
            safe_kernels=safe_kernels,
            verbose=verbose,
            embeds=embeds,
        )
        try:
            self.opened = self.ask(request, Opened)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def close(self) -> None:
        """End the child."""
        self._child.close()

    def ask(self, request: FrozenModel, answer: type[A]) -> A:
        """Return the answer to a request; more answers to the same come from receive."""
        self._send(request)
        return self.receive(answer)

    def receive(self, answer: type[A]) -> A:
        """Return the next answer, which has to be of that type."""
        found = self._receive()
        if not isinstance(found, answer):
            raise _unexpected(found)
        return found

    def tokenize(
        self, text: str, *, add_special: bool, model: int = 0, control_tokens: bool = False
    ) -> tuple[TokenIds, npt.NDArray[np.int64]]:
        """Return the text's token ids and where each ends in its UTF-8 bytes."""
        request = Tokenize(
            model=model, text=text, add_special=add_special, control_tokens=control_tokens
        )
        found = self.ask(request, Tokenized)
        return unpack_ids(found.ids), unpack_ids(found.ends).astype(np.int64)

    def detokenize(self, ids: TokenIds) -> tuple[bytes, npt.NDArray[np.int64]]:
        """Return the text of the first model's tokens and where each ends in it."""
        found = self.ask(Detokenize(model=0, ids=pack_ids(ids)), Detokenized)
        return base64.b64decode(found.text), unpack_ids(found.ends).astype(np.int64)

    def likelihoods(
        self, index: int, sequences: Sequence[tuple[TokenIds, int]], *, model: int = 0
    ) -> list[tuple[float, bool]]:
        """Return log p of the last n tokens of each sequence, and whether all are greedy."""
        request = Likelihood(
            model=model,
            index=index,
            ids=tuple(pack_ids(ids) for ids, _ in sequences),
            n_scored=tuple(n for _, n in sequences),
        )
        found = self.ask(request, Likelihoods)
        return list(zip(found.values, found.greedy, strict=True))

    def generate(self, prompts: Sequence[TokenIds], n_tokens: int) -> tuple[list[TokenIds], float]:
        """Return the first model's greedy continuations of the prompts, and the seconds taken."""
        request = Generate(prompts=tuple(pack_ids(p) for p in prompts), n_tokens=n_tokens)
        found = self.ask(request, Generated)
        return [unpack_ids(ids) for ids in found.ids], found.seconds

    def score(
        self,
        index: int,
        ids: TokenIds,
        first_target: int,
        *,
        has_reference: bool,
        reference_logits: str | None = None,
        save_logits: str | None = None,
    ) -> Iterator[Scored]:
        """Yield the scores of the sequence, one for each model, in the models' order."""
        request = Score(
            index=index,
            ids=pack_ids(ids),
            first_target=first_target,
            has_reference=has_reference,
            reference_logits=reference_logits,
            save_logits=save_logits,
        )
        return self.answers(request)

    def answers(self, request: Score) -> Iterator[Scored]:
        """Yield the answers to a request for scores, one for each model."""
        self._send(request)
        for _ in self._paths:
            yield self.receive(Scored)

    def collect(self, path: Path, key: str = "") -> KeptFile:
        """Return what the tap took, in a file at path that says this key of itself."""
        self.ask(Collect(path=str(path), key=key), Collected)
        found = KeptFile.opened(path, key)
        if found is None:
            raise EngineError(f"{path}: is gone, or was changed by another process")
        return found

    def embed(self, index: int, ids: TokenIds) -> Iterator[Embedded]:
        """Yield the embeddings of a text, one for each model, in the models' order."""
        self._send(Embed(index=index, ids=pack_ids(ids)))
        for _ in self._paths:
            yield self.receive(Embedded)

    def _send(self, message: FrozenModel) -> None:
        try:
            self._child.send(message)
        except ChildDiedError as e:
            raise self._crash(e) from None

    def _receive(self) -> Answer:
        while line := self._child.receive():
            try:
                found = ResponseAdapter.validate_json(line)
            except ValidationError:
                break  # cut short by a crash in the middle of a line
            if isinstance(found, Failed) and found.model_kind is not None:
                at = self._at
                raise WrongKindError(at.model, at.index, found.message, found.model_kind)
            if isinstance(found, Failed):
                raise ModelError(self._at.model, self._at.index, found.message)
            if not isinstance(found, Started):
                return found
            self._at = found
        raise self._crash(self._child.died())

    def _crash(self, died: ChildDiedError) -> CrashError:
        """Return the end of the child as a crash of the model that it was at."""
        path, index = self._paths[self._at.model], self._at.index
        doing = "while loading" if index is None else f"in sequence {index}"
        hint = "; --safe-kernels avoids llama.cpp's repacked kernels"
        if self._safe_kernels or -died.code in (signal.SIGBUS, signal.SIGKILL):
            hint = ""
        return CrashError(
            self._at.model,
            index,
            f"{path}: llama.cpp crashed {doing}: {describe_exit(died.code)}{hint}"
            f"{quoted(died.said)}",
            died.code,
        )


def _unexpected(found: FrozenModel) -> EngineError:
    return EngineError(f"the engine answered {type(found).__name__}; this is a bug of ramgguf")
