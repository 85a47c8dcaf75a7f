"""The child process that makes prompts of chats, with the template of a file that may be hostile.

A template is a program. Jinja's sandbox keeps it from files and the interpreter's insides, not from
loops and large strings: the parent ends this process after a time, its memory is limited, and so is
its time, should the parent end first.
"""

import json
import math
import os
import queue
import resource
import sys
import threading
from typing import Any

from ramgguf.llama.child import queue_lines, take_stdout
from ramgguf.llama.limits import cap_growth
from ramgguf.llama.server_protocol import ChatFormat, Render, Rendered
from ramgguf.llama.system import llama_module

GROWTH_BYTES = 128 << 20
CPU_SECONDS = 10  # of a template; the parent allows it less, by the clock


class _RecordedError(Exception):
    """The handler has made its prompt."""

    def __init__(self, rendered: Rendered) -> None:
        self.rendered = rendered


class _Recorder:
    """In the model's place: llama-cpp-python's chat handlers give it their prompt."""

    verbose = False

    def __init__(self) -> None:
        self._add_bos = False

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> bytes:
        self._add_bos = add_bos
        return text

    def create_completion(self, prompt: Any, stop: Any = None, **_: Any) -> None:
        text = prompt.decode() if isinstance(prompt, bytes) else str(prompt)
        stops = [stop] if isinstance(stop, str) else stop or ()
        # An empty stop would end every answer at once; a file without EOS has one.
        kept = tuple(s for s in stops if s)
        raise _RecordedError(Rendered(prompt=text, stop=kept, add_bos=self._add_bos))


class Renderer:
    """One chat format. Raises whatever a template raises when it is compiled."""

    def __init__(self, chat: ChatFormat) -> None:
        from llama_cpp import llama_chat_format as formats

        self._name = None if chat.template is not None else chat.name or "chatml"
        if self._name is not None:
            registry = formats.LlamaChatCompletionHandlerRegistry()
            self._handle = registry.get_chat_completion_handler_by_name(self._name)
        else:
            self._handle = formats.Jinja2ChatFormatter(
                template=chat.template, eos_token=chat.eos_token, bos_token=chat.bos_token
            ).to_chat_handler()

    def __call__(self, request: Render) -> Rendered:
        """Return the prompt, or in a line why there is none."""
        asked: dict[str, Any] = {"messages": request.messages, "stop": []}
        # llama-cpp-python's named formats ignore tools, or make several prompts for one answer.
        if request.tools and self._name is not None:
            if request.tool_choice != "none":
                return Rendered(
                    error=f"the chat format {self._name} takes no tools; the template of a file may"
                )
        elif request.tools:
            asked |= {"tools": request.tools, "tool_choice": request.tool_choice}
        try:
            self._handle(llama=_Recorder(), **asked)
        except _RecordedError as e:
            n_bytes = len(e.rendered.prompt.encode("utf-8", "replace"))
            if n_bytes > request.max_bytes:
                return Rendered(
                    error=f"the chat makes a prompt of {n_bytes} bytes, more than "
                    f"{request.max_bytes}"
                )
            return e.rendered
        except MemoryError:
            return Rendered(error="the chat template asks for too much memory")
        except Exception as e:  # a template raises what it likes
            said = (str(e).splitlines() or [""])[0][:200]
            return Rendered(error=f"the chat template refuses: {type(e).__name__}: {said}")
        return Rendered(error="the chat format makes no prompt")


def main() -> None:
    """Answer chats on stdin until it ends, whatever is computed then; the first line is the format.

    A template that takes more than CPU_SECONDS ends the process by SIGXCPU.
    """
    out = take_stdout()
    chat = ChatFormat.model_validate_json(sys.stdin.readline())
    llama_module()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=queue_lines, args=(sys.stdin, lines), daemon=True).start()

    def say(text: str) -> None:
        out.write(text + "\n")
        out.flush()

    cap_growth(GROWTH_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _allow_cpu(CPU_SECONDS)
    try:
        render = Renderer(chat)
    except Exception as e:  # as above
        said = (str(e).splitlines() or [""])[0][:200]
        say(json.dumps({"error": f"{type(e).__name__}: {said}"}))
        os._exit(0)
    say("{}")
    while True:
        request = Render.model_validate_json(lines.get())
        _allow_cpu(CPU_SECONDS)
        rendered = render(request)
        try:
            text = rendered.model_dump_json()
        except ValueError:  # a lone surrogate
            text = Rendered(error="the chat makes a prompt that is no Unicode").model_dump_json()
        say(text)


def _allow_cpu(seconds: int) -> None:
    """Have the system end this process when it has taken so much more time of the CPU.

    The thread that reads stdin cannot: one operation on large numbers keeps it waiting for minutes.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main()
