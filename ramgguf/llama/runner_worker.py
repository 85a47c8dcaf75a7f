"""The child process with a LocalRunner in it: passes over a copy of a model, on request."""

import time
from contextlib import ExitStack
from pathlib import Path

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.gguf.reader import open_gguf
from ramgguf.llama.child import answer_requests
from ramgguf.llama.forward import ForwardRequest
from ramgguf.llama.local_runner import LocalRunner
from ramgguf.llama.protocol import pack_ids, unpack_ids
from ramgguf.llama.runner_protocol import (
    AboutRunner,
    AnyRunnerRequest,
    Compare,
    Compared,
    DrawIds,
    DrawnIds,
    OpenRunner,
    Prepare,
    Prepared,
    RunnerOpened,
    RunnerRequestAdapter,
    pack_float64,
)
from ramgguf.llama.system import system_info
from ramgguf.llama.tokens import wanted_by
from ramgguf.quants.imatrix import planned_imatrix


class RunnerSession:
    """The local runner, once it is open, and the answers to requests."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._runner: LocalRunner | None = None

    def answer(self, request: AnyRunnerRequest) -> FrozenModel:
        """Return the answer to a request; the first opens the runner."""
        if isinstance(request, OpenRunner):
            return self._open(request)
        if self._runner is None:
            raise EngineError("there is no local runner yet; this is a bug of ramgguf")
        match request:
            case AboutRunner():
                return _about(self._runner)
            case DrawIds():
                return _drawn(self._runner, request)
            case Prepare():
                ids = [unpack_ids(text) for text in request.ids]
                return Prepared(fingerprints=tuple(self._runner.fingerprints(ids)))
            case Compare():
                return _compared(self._runner, request)

    def _open(self, request: OpenRunner) -> RunnerOpened:
        file = self._stack.enter_context(open_gguf(Path(request.path), kind_check=True))
        folder = Path(request.folder) if request.folder is not None else None
        self._runner = self._stack.enter_context(
            LocalRunner(
                file,
                folder,
                n_ctx=request.n_ctx,
                threads=request.n_threads,
                encoder=request.encoder,
                imatrix=planned_imatrix(request.imatrix),
                stand_in=request.stand_in,
            )
        )
        return _about(self._runner)


def _about(runner: LocalRunner) -> RunnerOpened:
    return RunnerOpened(
        system=system_info(), n_vocab=runner.n_vocab, reload_seconds=runner.reload_seconds
    )


def _drawn(runner: LocalRunner, request: DrawIds) -> DrawnIds:
    wanted = wanted_by(request)
    start = time.perf_counter()
    if request.sizes:
        sets = runner.draw_sets(wanted, request.sizes, request.first)
        drawn = tuple(ids for part in sets for ids in part)
    else:
        drawn = runner.draw(wanted, request.indices)
    seconds = time.perf_counter() - start
    return DrawnIds(ids=tuple(pack_ids(ids) for ids in drawn), seconds=seconds)


def _compared(runner: LocalRunner, request: Compare) -> Compared:
    ids = tuple(unpack_ids(text) for text in request.ids)
    runner.fingerprints([unpack_ids(text) for text in request.prepared])
    fingerprints = tuple(runner.fingerprints(ids))
    start = time.perf_counter()
    ((_, found),) = runner.run([ForwardRequest(request.changes, ids, request.start, request.end)])
    return Compared(
        kld=pack_float64(found.kld),
        nmse=found.nmse,
        fingerprints=fingerprints,
        seconds=time.perf_counter() - start,
        why_whole=found.why_whole,
        errors=None if found.errors is None else pack_float64(found.errors),
    )


def main() -> None:
    """Answer requests until the parent goes."""
    answer_requests(RunnerRequestAdapter, RunnerSession().answer)


if __name__ == "__main__":
    main()
