"""The Modelfile from which Ollama imports a GGUF file (https://docs.ollama.com/modelfile)."""

from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.files import refuse_existing, write_atomically
from ramgguf.gguf.shards import model_stem


def modelfile_path(output: Path) -> Path:
    """Return the path of the Modelfile of an output."""
    return output.with_name(f"{model_stem(output)}.Modelfile")


def write_modelfile(output: Path, n_ctx: int | None, *, force: bool) -> Path:
    """Write the Modelfile beside the output and return its path.

    n_ctx is the context that the file was made for; None leaves it to Ollama, as does the chat
    template, which the GGUF file has. Raises GGUFError when it exists and force is not given.
    """
    path = modelfile_path(output)
    refuse_existing(path, force=force, error=GGUFError)
    if not output.name.isprintable():
        raise GGUFError(f"{output}: a Modelfile cannot name this file; rename it")
    lines = [f"FROM ./{output.name}"]
    if n_ctx is not None:
        lines.append(f"PARAMETER num_ctx {n_ctx}")
    write_atomically(path, ("\n".join(lines) + "\n").encode(), error=GGUFError)
    return path
