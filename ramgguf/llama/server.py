"""The child process that serves a model: llama-cpp-python's OpenAI-compatible server.

It reads one request, answers when the server listens, and ends when the parent closes its stdin.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ramgguf.core.errors import EngineError
from ramgguf.gguf.header import ggml_type
from ramgguf.llama.child import Failure, take_stdout
from ramgguf.llama.server_errors import answer_as_client_errors
from ramgguf.llama.server_protocol import GRACE_SECONDS, Serve, Serving
from ramgguf.llama.sizes import N_BATCH, N_UBATCH, SizesOf, context_parameters
from ramgguf.llama.system import llama_module, system_info

_SAMPLE_TOKENS = 64  # enough for the kernels of whole batches
_FILES_TEMPLATE = "chat_template.default"  # llama-cpp-python's name of it


def run(request: Serve, watch: Callable[[Any], None], answer: Callable[[Serving], None]) -> None:
    """Load the model, try it, serve until the server is told to end.

    watch is given the server before it starts, and answer is told when it listens. Raises
    EngineError when a package is missing or llama.cpp refuses.
    """
    started = time.perf_counter()
    llama = llama_module(verbose=request.verbose)
    uvicorn, server_package = _server_packages()
    listener = bind(request.host, request.port)
    impose(llama, request)
    answer_as_client_errors(server_package.errors)
    app = _loaded(server_package, request)

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            seconds = time.perf_counter() - started
            port = listener.getsockname()[1]
            answer(Serving(port=port, seconds=seconds, system=system_info()))

    config = uvicorn.Config(
        app,
        lifespan="off",
        log_level="info" if request.verbose else "warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config)
    watch(server)
    server.run(sockets=[listener])


def _server_packages() -> tuple[ModuleType, ModuleType]:
    # A variable that the server would take for the name of its own configuration.
    os.environ.pop("CONFIG_FILE", None)
    try:
        import llama_cpp.server.app
        import uvicorn
    except ImportError as e:
        raise EngineError(
            f"the server's packages cannot be imported ({e}); pip install 'ramgguf[server]'"
        ) from None
    return uvicorn, llama_cpp.server


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address, which does not listen yet; port 0 is any free one.

    Raises EngineError when it cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError:
            found.close()
            raise
    except (OSError, OverflowError) as e:
        raise EngineError(
            f"{host}:{port} cannot be listened at: {e}; choose another --host or --port"
        ) from None
    return found


def impose(llama: ModuleType, request: Serve) -> None:
    """Have models loaded and contexts made as the deployment test does.

    llama-cpp-python has no settings for kernels, for windows of sliding attention, and for flash
    attention where it is possible: they are set where the parameters go to llama.cpp.
    """
    functions = llama.llama_cpp
    load, make_context = functions.llama_model_load_from_file, functions.llama_init_from_model
    wanted = SizesOf(
        path=request.path,
        n_ctx=request.n_ctx,
        n_seq=1,
        type_k=request.type_k,
        type_v=request.type_v,
    )

    def load_as_asked(path: bytes, parameters: Any) -> Any:
        parameters.use_extra_bufts = not request.safe_kernels
        return load(path, parameters)

    def make_context_as_asked(model: Any, _: Any) -> Any:
        parameters = context_parameters(llama, wanted)
        parameters.n_threads = parameters.n_threads_batch = request.n_threads
        return make_context(model, parameters)

    functions.llama_model_load_from_file = load_as_asked
    functions.llama_init_from_model = make_context_as_asked


def _loaded(package: Any, request: Serve) -> Any:
    """Return the application with the model loaded and tried."""
    # model_construct: validation would take settings from variables such as SEED and CACHE.
    model = package.settings.ModelSettings.model_construct(
        model=request.path,
        model_alias=request.alias,
        n_ctx=request.n_ctx,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        n_threads=request.n_threads,
        n_threads_batch=request.n_threads,
        type_k=ggml_type(request.type_k).id,
        type_v=ggml_type(request.type_v).id,
        use_mmap=False,  # as in the deployment test: what is resident is what the model needs
        use_mlock=False,
        logits_all=False,  # true would keep those of the whole context
        chat_format=_require_chat_format(request.chat_format) or _FILES_TEMPLATE,
        verbose=request.verbose,
    )
    server = package.settings.ServerSettings.model_construct(
        host=request.host,
        port=request.port,
        api_key=request.api_key,
        interrupt_requests=False,  # a request waits for the one before, and does not cut it off
    )
    try:
        app = package.app.create_app(server_settings=server, model_settings=[model])
    except Exception as e:  # the file's template is a program of its own and may raise anything
        raise EngineError(
            f"{request.path}: llama.cpp cannot serve it ({_told(e)}); run with -v to see why"
        ) from None
    loaded = package.app._llama_proxy()
    loaded.model_path = request.alias  # answers call the model so where a request names none
    _try(loaded, request)
    return app


def _require_chat_format(name: str | None) -> str | None:
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry

    known = sorted(LlamaChatCompletionHandlerRegistry()._chat_handlers)
    if name is not None and name not in known:
        raise EngineError(
            f"{name!r} is no chat format of llama-cpp-python; it knows {', '.join(known)}"
        )
    return name


def _try(model: Any, request: Serve) -> None:
    """Decode a batch and a token: where kernels crash, they do so before anybody asks."""
    try:
        ids = model.tokenize(request.sample_text.encode())
        ids = ids[: max(1, min(_SAMPLE_TOKENS, request.n_ctx - 2))]
        model.create_completion(ids, max_tokens=2, temperature=0.0)
        model.reset()
    except Exception as e:  # whatever its bindings raise
        raise EngineError(f"{request.path}: llama.cpp cannot run it ({_told(e)})") from None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def main() -> None:
    """Serve what the first line of stdin asks for, until stdin ends."""
    out = take_stdout()
    request = Serve.model_validate_json(sys.stdin.readline())
    if not request.verbose:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would print pages of it
    servers: list[Any] = []
    threading.Thread(target=_end_with_parent, args=(servers,), daemon=True).start()

    def say(message: Serving | Failure) -> None:
        out.write(message.model_dump_json() + "\n")
        out.flush()

    try:
        run(request, servers.append, say)
    except (EngineError, MemoryError) as e:
        say(Failure(message=str(e) or "out of memory"))
    sys.stderr.flush()
    os._exit(0)  # a thread may be in the middle of a computation


def _end_with_parent(servers: list[Any]) -> None:
    """When stdin ends, have the server end; at once if it has not started, or takes too long."""
    while sys.stdin.readline():
        pass
    if servers:
        servers[0].should_exit = True
        time.sleep(GRACE_SECONDS + 2)
    os._exit(0)


if __name__ == "__main__":
    main()
