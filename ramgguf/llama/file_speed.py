"""How fast a file is on this machine, in a process of its own."""

from pathlib import Path

from ramgguf.core.parallel import default_threads
from ramgguf.llama.child import Child
from ramgguf.llama.trial_protocol import Load, Loaded, Rates, Time

_TEXT = "The rivers bring the water back to the sea, where the journey begins again. "


def time_file(
    path: Path,
    *,
    threads: int | None = None,
    n_prompt: int = 512,
    n_generated: int = 8,
    n_repeats: int = 9,
) -> Rates:
    """Return tokens per second of prompts and of generation after them, one for each repeat.

    Raises EngineError where llama.cpp is missing, or cannot load the file.
    """
    load = Load(
        path=str(path), n_ctx=n_prompt + n_generated, n_threads=threads or default_threads()
    )
    timing = Time(text=_TEXT, n_prompt=n_prompt, n_generated=n_generated, n_repeats=n_repeats)
    with Child("ramgguf.llama.trial") as child:
        child.ask(load, Loaded)
        return child.ask(timing, Rates)
