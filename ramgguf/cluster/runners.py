"""Where passes run: in a child of this process, or on the workers of an executor.

llama.cpp never runs in the command's own process: a crash there is an error here.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ramgguf.cluster.remote_runner import RemoteRunner
from ramgguf.cluster.worker_pool import WorkerPool
from ramgguf.core.errors import EngineError
from ramgguf.core.parallel import default_threads
from ramgguf.core.scratch import scratch_folder
from ramgguf.gguf.hub import local_path
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.forward import ForwardRunner
from ramgguf.llama.tokens import TokenRequest


@dataclass(frozen=True)
class Opened:
    """An open model, what opens the passes over it, and where what they tell is kept."""

    file: GGUFFile
    opening: contextlib.AbstractContextManager[ForwardRunner]
    journal: Path


@contextlib.contextmanager
def opened(
    model: str | Path,
    request: TokenRequest,
    *,
    folder: str | Path | None,
    journal: str | Path | None,
    threads: int | None,
    executor: Executor | None,
) -> Iterator[Opened]:
    """Yield the model, ready for a request's passes.

    folder takes the copies of the model, on workers if there is an executor; without a journal,
    one is kept for the time being. Raises GGUFError for what is no model, EngineError when there is
    no folder to write to.
    """
    copies = Path(folder) if folder is not None else None
    with (
        open_gguf(local_path(model), kind_check=True) as file,
        scratch_folder(copies if executor is None else None, error=EngineError) as scratch,
    ):
        opening = open_runner(
            file,
            request,
            scratch=scratch,
            threads=threads or default_threads(),
            executor=executor,
            workers_folder=copies,
        )
        yield Opened(file, opening, Path(journal) if journal is not None else scratch / "journal")


@contextlib.contextmanager
def open_runner(
    file: GGUFFile,
    request: TokenRequest,
    *,
    scratch: Path,
    threads: int,
    executor: Executor | None = None,
    workers_folder: Path | None = None,
) -> Iterator[ForwardRunner]:
    """Yield the passes that a request takes, with `threads` threads each.

    scratch takes the copy of the model that a child of this process makes, workers_folder those on
    workers. Raises EngineError when llama.cpp or a worker fails.
    """
    with contextlib.ExitStack() as stack:
        folder, is_here = workers_folder, executor is None
        if executor is None:
            executor, folder = stack.enter_context(ThreadPoolExecutor(1)), scratch
        yield RemoteRunner(
            stack.enter_context(WorkerPool(executor, is_here=is_here)),
            file,
            n_ctx=request.n_ctx,
            threads=threads,
            encoder=request.encoder,
            imatrix=request.imatrix,
            folder=folder,
            stand_in=request.stand_in,
        )
