"""Executors by name: worker threads of this process, or the workers of a Dask cluster."""

import contextlib
import logging
import re
import socket
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from ramgguf.cluster.dask_executor import DaskExecutor
from ramgguf.core.errors import EngineError

CONNECT_SECONDS = 5
ANSWER_SECONDS = 30  # until a scheduler that is there has answered, on a busy machine
WORKER_SECONDS = 10
_DASK = re.compile(r"dask(?P<tls>\+tls)?://(?P<host>[^/\s:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")
_LOCAL = re.compile(r"local:(?P<n>[1-9]\d{0,3})")


@contextlib.contextmanager
def connected(name: str | None) -> Iterator[Executor | None]:
    """Yield the executor that a name stands for; None for no name.

    local:N are N workers on this machine, dask://HOST:PORT those of the Dask scheduler there, and
    dask+tls://HOST:PORT the same by TLS, with the certificates that Dask's configuration names. On
    the way out, what has not begun is cancelled. Raises EngineError for other names, without
    `distributed` or a certificate, and when no scheduler or no worker answers within seconds.
    """
    if name is None:
        yield None
    elif found := _LOCAL.fullmatch(name):
        # Threads will do: each worker's llama.cpp runs in a child process of its own.
        pool = ThreadPoolExecutor(int(found["n"]))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
    elif found := _DASK.fullmatch(name):
        at = found["host"], int(found["port"])
        with _dask(name, *at, encrypted=found["tls"] is not None) as executor:
            yield executor
    else:
        raise EngineError(
            f"executor {name!r} is neither local:N nor dask://HOST:PORT nor dask+tls://HOST:PORT"
        )


@contextlib.contextmanager
def _dask(name: str, host: str, port: int, *, encrypted: bool) -> Iterator[Executor]:
    try:
        import distributed
    except ImportError as e:
        raise EngineError(
            f"{name}: distributed cannot be imported ({e}); pip install 'ramgguf[cluster]'"
        ) from None
    # Our own errors report lost connections.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    address = f"{host}:{port}"
    security = _certificates(name, distributed) if encrypted else None
    try:
        # Dask retries for long; a closed port is an error at once.
        socket.create_connection((host.strip("[]"), port), timeout=CONNECT_SECONDS).close()
        client = distributed.Client(
            f"{'tls' if encrypted else 'tcp'}://{address}",
            timeout=ANSWER_SECONDS,
            set_as_default=False,
            security=security,
        )
    # RuntimeError: Dask's configuration asks for encryption, and the name does not.
    except (OSError, OverflowError, ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise EngineError(f"{name}: no scheduler answers there ({reason})") from None
    try:
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:
            raise EngineError(
                f"{name}: the scheduler has no workers; start some: dask worker {address}"
            ) from None
        yield DaskExecutor(client)
    finally:
        client.close()


def _certificates(name: str, distributed: Any) -> Any:
    """Return Dask's security with what its configuration names. Raises EngineError without."""
    security = distributed.Security(require_encryption=True)
    files = {
        "CA_FILE": security.tls_ca_file,
        "CLIENT__CERT": security.tls_client_cert,
        "CLIENT__KEY": security.tls_client_key,
    }
    missing = [f"DASK_DISTRIBUTED__COMM__TLS__{key}" for key, path in files.items() if not path]
    if missing:
        raise EngineError(
            f"{name}: Dask's configuration names no certificates; set {', '.join(missing)}"
        )
    try:
        security.get_connection_args("client")
    except OSError as e:  # ssl.SSLError is one
        paths = ", ".join(files.values())
        raise EngineError(f"{name}: {paths} are no certificates that can be used ({e})") from None
    return security
