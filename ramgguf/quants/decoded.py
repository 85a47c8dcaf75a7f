"""A quantized file decoded into the types of its source: what runs on it runs as fast as there.

Some kernels of small formats take two to three times as long for a token as those of F16. What
differs from the file itself: they round activations, too, and values are rounded once more.
"""

from pathlib import Path

from ramgguf.core.parallel import Chunk, map_chunks, runs
from ramgguf.core.progress import Progress, Silent
from ramgguf.gguf.header import u32
from ramgguf.gguf.layout import plan_layout
from ramgguf.gguf.reader import GGUFFile
from ramgguf.gguf.writer import GGUFOutput
from ramgguf.quants.encoders.decoding import decode_rows
from ramgguf.quants.roundtrip import SOURCES, in_type


def write_decoded(
    file: GGUFFile, source: GGUFFile, path: Path, *, threads: int, progress: Progress | None = None
) -> Path:
    """Write the file's weights in the types of the source's tensors, and return the path.

    A tensor stays as it is where its source is neither F32, F16 nor BF16. Raises GGUFError when it
    does not fit the disk.
    """
    sources = {t.name: t.type_name for t in source.tensors}
    types = {t.name: sources.get(t.name, t.type_name) for t in file.tensors}
    types = {
        t.name: types[t.name] if types[t.name] in SOURCES else t.type_name for t in file.tensors
    }
    kind = source.metadata.integer("general.file_type")
    layout = plan_layout(
        path, file, types, {} if kind is None else {"general.file_type": u32(kind)}
    )
    shown = progress or Silent()

    def write(chunk: Chunk) -> int:
        tensor = file.tensors[chunk.index]
        rows = file.read_rows(tensor, chunk.start, chunk.stop)
        to = types[tensor.name]
        data = rows
        if to != tensor.type_name:
            data = in_type(to, decode_rows(tensor.type_name, rows, tensor.row_length))
        output.write_at(tensor.name, chunk.start * data.shape[1], data)
        return rows.nbytes

    shown.start("decode", sum(t.n_bytes for t in file.tensors), "bytes")
    try:
        with GGUFOutput(layout, file, force=False) as output:
            for n_bytes in map_chunks(write, runs(file.tensors), threads):
                shown.advance(n_bytes)
            return output.commit()[0]
    finally:
        shown.finish()
