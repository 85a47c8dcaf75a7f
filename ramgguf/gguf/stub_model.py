"""Stub models: the header that a plan will write, and a hole of the right length for the data.

They take a few megabytes of disk whatever the model's size, and are enough for llama.cpp to say
how much memory the real file would take.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ramgguf.core.errors import GGUFError
from ramgguf.core.scratch import scratch_folder
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile


@contextmanager
def stub_model(source: GGUFFile, tensor_types: Mapping[str, str]) -> Iterator[Path]:
    """Yield the path of a stub model in the source's shapes and these types, removed after use.

    Tensors that are not named keep their type. Raises GGUFError when it cannot be written.
    """
    with scratch_folder(None, error=GGUFError) as folder:
        path = folder / "stub.gguf"
        shard = plan_layout(path, source, tensor_types, {}).shards[0]
        try:
            with path.open("wb") as out:
                out.write(shard.header)
                out.truncate(shard.n_bytes)
        except OSError as e:
            raise GGUFError(
                f"{path}: a stub model of {shard.n_bytes} bytes cannot be written: {e.strerror}; "
                "does the folder for temporary files (TMPDIR) allow files with holes?"
            ) from None
        yield path
