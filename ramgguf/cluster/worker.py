"""The worker's side: perform a task with what is kept open, and say who did."""

import os
import signal
import socket
import sys
from typing import Literal

from ramgguf.cluster.session_cache import SESSIONS
from ramgguf.cluster.tasks import Done, Failed, Task, WorkerInfo
from ramgguf.core.errors import RamggufError
from ramgguf.core.version import __version__
from ramgguf.llama.child import ChildDiedError
from ramgguf.llama.client import CrashError, ModelError, WrongKindError


def perform(task: Task) -> Done | Failed:
    """Return the task's answer, or why there is none."""
    name = worker_name()
    if task.version != __version__:
        found = f"has ramgguf {__version__}, expected {task.version}; install the same everywhere"
        return Failed(name, "error", found)
    try:
        with SESSIONS.use(task.key, task.run) as tool:
            return Done(WorkerInfo(name, tool.system), tool.perform(task.request))
    except CrashError as e:
        return Failed(name, _kind(e.code), str(e), e.model, e.index)
    except WrongKindError as e:
        return Failed(name, "refused", str(e), e.model, e.index, e.kind)
    except ModelError as e:
        return Failed(name, "refused", str(e), e.model, e.index)
    except ChildDiedError as e:
        return Failed(name, _kind(e.code), str(e))
    except RamggufError as e:
        return Failed(name, "error", str(e))


def _kind(code: int | None) -> Literal["crashed", "lost"]:
    """Return whose fault it is that a child ended: nothing in llama.cpp sends SIGKILL."""
    return "lost" if code == -signal.SIGKILL else "crashed"


def worker_name() -> str:
    """Return the worker's host and process, and its address where it is one of Dask's."""
    name = f"{socket.gethostname()} (process {os.getpid()})"
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            return f"{distributed.get_worker().address} on {name}"
        except ValueError:  # this process is none of its workers
            pass
    return name
