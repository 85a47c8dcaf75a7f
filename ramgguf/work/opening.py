"""Where passes run: in this process, or on the workers of an executor if there is one."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from ramgguf.gguf_io import GGUFFile
from ramgguf.passes import Passes
from ramgguf.probe_tokens import Request
from ramgguf.work.crew import Crew
from ramgguf.work.passes import CrewPasses
from ramgguf.workbench import Workbench


@contextlib.contextmanager
def passes_over(
    file: GGUFFile,
    request: Request,
    *,
    scratch: Path,
    threads: int,
    executor: Executor | None = None,
    workers_folder: Path | None = None,
) -> Iterator[Passes]:
    """Yield the passes that a request takes, with `threads` threads each.

    scratch takes the copy of the model in this process, workers_folder those on workers. Raises
    EngineError when llama.cpp or a worker fails.
    """
    if executor is None:
        with Workbench(
            file,
            scratch,
            n_ctx=request.n_ctx,
            threads=threads,
            encoder=request.encoder,
            imatrix=request.imatrix,
        ) as bench:
            yield bench
        return
    with Crew(executor) as crew:
        yield CrewPasses(
            crew,
            file,
            n_ctx=request.n_ctx,
            threads=threads,
            encoder=request.encoder,
            imatrix=request.imatrix,
            folder=workers_folder,
        )
