"""The child process that runs a model for the server's front: JSON lines in, JSON lines out.

It opens no socket. It answers one request at a time, and ends when its stdin does. What its memory
was after loading, and some room, is all that it may take: a request that needs more ends it, not
the machine.
"""

import contextlib
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from ramgguf.core.errors import EngineError
from ramgguf.gguf.header import ggml_type
from ramgguf.llama.child import Failure, take_stdout
from ramgguf.llama.kind import KindError, kind_of
from ramgguf.llama.limits import cap_growth
from ramgguf.llama.server_protocol import (
    Cancel,
    ChatFormat,
    Detokenize,
    Finished,
    Generate,
    Loaded,
    Piece,
    Refused,
    Request,
    Serve,
    Text,
    Tokenize,
    Tokens,
)
from ramgguf.llama.sizes import N_BATCH, N_UBATCH, SizesOf, context_parameters
from ramgguf.llama.system import llama_module, system_info

_SAMPLE_TOKENS = 64  # enough for the kernels of whole batches
_REQUEST: TypeAdapter[Any] = TypeAdapter(Request)

Say = Callable[[BaseModel], None]


class _CancelledError(Exception):
    """Nobody waits for the answer any more."""


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


def load(llama: ModuleType, request: Serve) -> Any:
    """Return the model, loaded and tried. Raises EngineError when llama.cpp refuses."""
    impose(llama, request)
    functions = llama.llama_cpp
    require_chat_format(request.chat_format)
    # Its compiler computes constants: 'x' * 2000000000 takes the memory of the machine. Templates
    # are compiled by the process for them alone.
    from llama_cpp import llama_chat_format

    llama_chat_format.Jinja2ChatFormatter = _NoTemplate
    try:
        model = llama.Llama(
            model_path=request.path,
            n_ctx=request.n_ctx,
            n_batch=N_BATCH,
            n_ubatch=N_UBATCH,
            n_threads=request.n_threads,
            n_threads_batch=request.n_threads,
            type_k=ggml_type(request.type_k).id,
            type_v=ggml_type(request.type_v).id,
            use_mmap=False,  # as in the deployment test: what is resident is what it needs
            use_mlock=False,
            logits_all=False,  # true would keep those of the whole context
            chat_format="chatml",  # never used: chats come as prompts
            verbose=request.verbose,
        )
    except Exception as e:  # whatever its bindings raise
        raise EngineError(
            f"{request.path}: llama.cpp cannot serve it ({_first_line(e)}); run with -v to see why"
        ) from None
    if (kind := kind_of(functions, model._model.model, model._ctx.ctx)) != "causal":
        raise KindError(request.path, kind)
    _try(model, request)
    return model


def require_chat_format(name: str | None) -> None:
    """Raise EngineError for a name that llama-cpp-python does not know."""
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerRegistry

    known = sorted(LlamaChatCompletionHandlerRegistry()._chat_handlers)
    if name is not None and name not in known:
        raise EngineError(
            f"{name!r} is no chat format of llama-cpp-python; it knows {', '.join(known)}"
        )


class _NoTemplate:
    """In the place of llama-cpp-python's formatter: it compiles nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def to_chat_handler(self) -> None:
        """Return no handler."""


def _try(model: Any, request: Serve) -> None:
    """Decode a batch and a token: where kernels crash, they do so before anybody asks."""
    try:
        ids = model.tokenize(request.sample_text.encode())
        ids = ids[: max(1, min(_SAMPLE_TOKENS, request.n_ctx - 2))]
        model.create_completion(ids, max_tokens=2, temperature=0.0)
        model.reset()
    except Exception as e:  # whatever its bindings raise
        raise EngineError(f"{request.path}: llama.cpp cannot run it ({_first_line(e)})") from None


def _first_line(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]


def chat_format(model: Any, name: str | None) -> ChatFormat:
    """Return how the model's chats become prompts: what the process for templates needs."""
    bos, eos = model.token_bos(), model.token_eos()

    def text(token: int) -> str:
        return str(model._model.token_get_text(token)) if token != -1 else ""

    template = None if name else model.metadata.get("tokenizer.chat_template")
    return ChatFormat(
        name=name, template=template, bos_token=text(bos), eos_token=text(eos), eos_id=eos
    )


class Engine:
    """The loaded model, and what is asked of it."""

    def __init__(self, llama: ModuleType, model: Any, n_ctx: int) -> None:
        self._llama, self._model, self._n_ctx = llama, model, n_ctx
        self._n_vocab = model.n_vocab()
        self._n_generated = 0
        self._cancelled: set[int] = set()
        self._current = -1
        self._generate = model.generate
        model.generate = self._counted  # create_completion calls it

    def cancel(self, request_id: int) -> None:
        """Have a request end that is being answered or will be; called by the reading thread."""
        if request_id >= self._current:
            self._cancelled.add(request_id)

    def _counted(self, *arguments: Any, **options: Any) -> Iterator[int]:
        vocab = self._model._model.vocab
        for token in self._generate(*arguments, **options):
            if self._current in self._cancelled:
                raise _CancelledError
            self._n_generated += not self._llama.llama_vocab_is_eog(vocab, token)
            yield token

    def answer(self, request: Generate | Tokenize | Detokenize, say: Say) -> None:
        """Answer a request; what it cannot do is refused in a line."""
        self._current = request.id
        try:
            if isinstance(request, Generate):
                self._continue(request, say)
            elif isinstance(request, Tokenize):
                ids = self._model.tokenize(request.text.encode(), special=True)
                say(Tokens(id=request.id, tokens=tuple(ids)))
            else:
                self._require_ids(request.tokens)
                text = self._model.detokenize(list(request.tokens)).decode("utf-8", "replace")
                say(Text(id=request.id, text=text))
        except _WrongError as e:
            say(Refused(id=request.id, message=str(e), code=e.code))
        except (ValueError, TypeError, RuntimeError, MemoryError) as e:  # llama-cpp-python's
            say(Refused(id=request.id, message=f"llama.cpp: {_first_line(e)}", is_fault=True))
        self._cancelled = {i for i in self._cancelled if i > request.id}

    def _require_ids(self, ids: tuple[int, ...]) -> None:
        wrong = next((i for i in ids if not 0 <= i < self._n_vocab), None)
        if wrong is not None:
            raise _WrongError(f"token {wrong} is none of the {self._n_vocab} of the vocabulary")

    def _prompt_ids(self, request: Generate) -> list[int]:
        special = request.add_special is not False
        ids = list(self._model.tokenize(request.prompt.encode(), add_bos=special, special=True))
        bos = self._model.token_bos()
        if not ids and bos == -1:
            raise _WrongError("the prompt has no tokens")
        ids = ids or [bos]
        if len(ids) >= self._n_ctx:
            raise _WrongError(
                f"This model's maximum context length is {self._n_ctx} tokens, "
                f"however the prompt has {len(ids)}",
                "context_length_exceeded",
            )
        return ids

    def _continue(self, request: Generate, say: Say) -> None:
        ids = self._prompt_ids(request)
        biased = request.sampling.get("logit_bias")
        if isinstance(biased, dict):
            self._require_ids(tuple(int(i) for i in biased))
        self._n_generated = 0
        reason: Literal["stop", "length", "cancelled"] = "length"
        grammar = request.grammar and self._llama.LlamaGrammar.from_string(request.grammar)
        # Without a seed llama-cpp-python derives one from that of the request before.
        options: dict[str, Any] = {"seed": secrets.randbits(32), **request.sampling}
        try:
            for chunk in self._model.create_completion(
                ids,
                max_tokens=min(request.max_tokens, self._n_ctx - len(ids)),
                stop=list(request.stop),
                grammar=grammar or None,
                stream=True,
                **options,
            ):
                choice = chunk["choices"][0]
                if choice["text"]:
                    say(Piece(id=request.id, text=choice["text"]))
                reason = choice["finish_reason"] or reason
        except _CancelledError:
            reason = "cancelled"
        done = Finished(
            id=request.id, reason=reason, n_prompt=len(ids), n_completion=self._n_generated
        )
        say(done)


class _WrongError(Exception):
    """The request is wrong: a line, and OpenAI's code for it."""

    def __init__(self, message: str, code: str | None = None) -> None:
        self.code = code
        super().__init__(message)


def main() -> None:
    """Load what the first line of stdin asks for, answer the others, until stdin ends."""
    out = take_stdout()
    request = Serve.model_validate_json(sys.stdin.readline())
    if not request.verbose:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # an abort would print pages of it
    lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
    engines: list[Engine] = []
    threading.Thread(target=_read, args=(lines, engines), daemon=True).start()

    def say(message: BaseModel) -> None:
        out.write(message.model_dump_json() + "\n")
        out.flush()

    try:
        llama = llama_module(verbose=request.verbose)
        model = load(llama, request)
        engines.append(Engine(llama, model, request.n_ctx))
        cap_growth(request.growth_bytes)
        say(Loaded(system=system_info(), chat=chat_format(model, request.chat_format)))
        while True:
            engines[0].answer(lines.get(), say)
    except (EngineError, MemoryError) as e:
        with contextlib.suppress(OSError):
            say(Failure(message=str(e) or "out of memory"))
    except OSError:  # the front is gone
        pass
    sys.stderr.flush()
    os._exit(0)  # a thread may be in the middle of a computation


def _read(lines: "queue.SimpleQueue[Any]", engines: list[Engine]) -> None:
    """Pass on requests, cancel at once; when stdin ends, end this process."""
    for line in sys.stdin:
        message = _REQUEST.validate_json(line)
        if isinstance(message, Cancel):
            engines[0].cancel(message.id)
        else:
            lines.put(message)
    os._exit(0)


if __name__ == "__main__":
    main()
