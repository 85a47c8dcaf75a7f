"""A quantized file decoded into the types of its source: what runs on it runs as fast as there.

Some kernels of small formats take two to three times as long for a token as those of F16. What
differs from the file itself: they round activations, too, and values are rounded once more.
"""

from pathlib import Path

from ramgguf.core.parallel import Chunk
from ramgguf.core.progress import Progress, Silent
from ramgguf.gguf.header import u32
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile
from ramgguf.gguf.writer import rewrite
from ramgguf.quants.encoders.decoding import decode_rows, in_type
from ramgguf.quants.roundtrip import SOURCES, Rows


def write_decoded(
    file: GGUFFile, source: GGUFFile, path: Path, *, threads: int, progress: Progress | None = None
) -> Path:
    """Write the file's weights in the types of the source's tensors, and return the path.

    A tensor stays as it is where its source is neither F32, F16 nor BF16. Raises GGUFError when it
    does not fit the disk.
    """
    types = {t.name: t.type_name for t in file.tensors}
    types |= {t.name: t.type_name for t in source.tensors if t.type_name in SOURCES}
    kind = source.metadata.integer("general.file_type")
    layout = plan_layout(
        path, file, types, {} if kind is None else {"general.file_type": u32(kind)}
    )

    def convert(chunk: Chunk, rows: Rows) -> Rows:
        tensor = file.tensors[chunk.index]
        to = types[tensor.name]
        if to == tensor.type_name:
            return rows
        return in_type(to, decode_rows(tensor.type_name, rows, tensor.row_length))

    return rewrite(
        layout, file, convert, stage="decode", threads=threads, progress=progress or Silent()
    )
