"""The workers of a Dask cluster as an executor."""

import sys
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from typing import Any


class DaskExecutor(Executor):
    """Tasks on the workers of a Dask client.

    Dask's own ClientExecutor looks at a task's status after it has the result, and fails the task
    when the worker that held the result died in between (distributed 2026.8, cfexecutor.py).
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    @classmethod
    def instead_of(cls, executor: Executor) -> Executor:
        """Return an executor of this kind for Dask's own; any other as it is."""
        module = sys.modules.get("distributed.cfexecutor")
        if module is not None and isinstance(executor, module.ClientExecutor):
            return cls(executor._client)
        return executor

    @property
    def n_workers(self) -> int:
        """How many tasks run at the same time."""
        return max(1, int(sum(self._client.nthreads().values())))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return a future of fn(*args, **kwargs) on a worker; it can be cancelled until then."""
        import asyncio  # in no process that has no Dask

        theirs = self._client.submit(fn, *args, **kwargs, pure=False)
        ours: Future[Any] = Future()

        async def pass_on() -> None:
            try:
                result = await self._client.gather(theirs, asynchronous=True)
            except (CancelledError, asyncio.CancelledError):
                ours.cancel()
                ours.set_running_or_notify_cancel()
            except Exception as e:
                if ours.set_running_or_notify_cancel():
                    ours.set_exception(e)
            else:
                if ours.set_running_or_notify_cancel():
                    ours.set_result(result)

        def cancel(done: Future[Any]) -> None:
            if done.cancelled() and theirs.status == "pending":
                theirs.cancel()

        ours.add_done_callback(cancel)
        self._client.loop.add_callback(pass_on)
        return ours
