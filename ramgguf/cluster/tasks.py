"""Requests to workers and their answers: picklable values that carry all that they need."""

from dataclasses import dataclass
from typing import Literal

from ramgguf.gguf.identity import FileIdentity
from ramgguf.llama.kind import ModelKind
from ramgguf.llama.protocol import (
    Detokenize,
    Detokenized,
    Opened,
    Score,
    Scored,
    SystemInfo,
    Tokenize,
    Tokenized,
)
from ramgguf.llama.runner_protocol import (
    AboutRunner,
    Compare,
    Compared,
    DrawIds,
    DrawnIds,
    Prepare,
    Prepared,
    RunnerOpened,
)
from ramgguf.llama.scorer import EngineOptions
from ramgguf.quants.imatrix import ImportanceSource


@dataclass(frozen=True)
class RunnerKey:
    """A local runner that a worker keeps open: a copy of the model, made in `folder`, and settings.

    stand_in is the format of the stand-in that is made instead of a copy. On equal kernels, runners
    of the same model with the same settings give the same numbers.
    """

    model: FileIdentity
    n_ctx: int
    n_threads: int
    encoder: str
    imatrix: ImportanceSource | None
    folder: str | None
    stand_in: str | None = None


@dataclass(frozen=True)
class EngineKey:
    """An engine that a worker keeps open: models that are scored together."""

    models: tuple[FileIdentity, ...]
    options: EngineOptions


@dataclass(frozen=True)
class OpenEngine:
    """Ask only what is open: answered by Opened."""


Key = RunnerKey | EngineKey
RunnerRequest = AboutRunner | DrawIds | Prepare | Compare
EngineRequest = OpenEngine | Tokenize | Detokenize | Score
RunnerAnswer = RunnerOpened | DrawnIds | Prepared | Compared
Answer = RunnerAnswer | Opened | Tokenized | Detokenized | tuple[Scored, ...]


@dataclass(frozen=True)
class Task:
    """One request to what is kept open under the key; label names it in errors.

    run tells whose task it is, version which ramgguf must answer it.
    """

    label: str
    key: Key
    request: RunnerRequest | EngineRequest
    run: str
    version: str


@dataclass(frozen=True)
class WorkerInfo:
    """Who computed: a name by which the worker is found, its llama.cpp and its CPU."""

    name: str
    system: SystemInfo

    def difference(self, other: "WorkerInfo") -> str | None:
        """Return what makes the numbers of two workers differ, None for workers of one kind.

        The name of the CPU may differ: its features, for which the kernels were compiled or chosen,
        may not.
        """
        pairs = (
            ("llama-cpp-python", self.system.llama_cpp_python, other.system.llama_cpp_python),
            ("llama.cpp", self.system.build, other.system.build),
            ("kernels", self.system.system_info, other.system.system_info),
        )
        for what, mine, its in pairs:
            if mine != its:
                return f"{what} {mine} on {self.name}, {its} on {other.name}"
        return None


@dataclass(frozen=True)
class Done:
    """A task's answer, and who gave it."""

    worker: WorkerInfo
    answer: Answer


@dataclass(frozen=True)
class Failed:
    """Why there is no answer.

    error: the worker or its files are unfit. refused, crashed: it is the model's fault, as
    ModelError and CrashError say. lost: the child was killed from outside, which the task may
    survive elsewhere. model_kind is as in WrongKindError.
    """

    worker: str
    kind: Literal["error", "refused", "crashed", "lost"]
    message: str
    model: int = 0
    index: int | None = None
    model_kind: ModelKind | None = None
