"""What llama.cpp's own quantizer would write: for every ftype × embedding type, by its dry run."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_quantize import dry_run

# The ftypes and embedding types that need no importance matrix.
FILE_TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)
EMBEDDINGS = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("IQ3_S", "IQ4_NL", "IQ4_XS"),
)

LEAST = 0.93  # of a mix's bytes: less is not worth a try as best flags

_TENSOR = re.compile(
    r"\] (?P<name>\S+) +- \[(?P<shape>[\d, ]+)\], type = +(?P<type>\S+),"
    r".*?(?:\((?P<to>\w+)\))?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Flags:
    """A choice of flags, the bytes of all tensors' data under it, and each tensor's type."""

    file_type: str
    embedding: str | None
    n_bytes: int
    types: Mapping[str, str]

    @property
    def label(self) -> str:
        return f"{self.file_type}-{self.embedding or 'default'}"


def flags(source: Path, file_type: str, embedding: str | None = None) -> Flags | None:
    """Return what llama.cpp would write for the flags; None if it refuses them."""
    said = dry_run(source, file_type, embedding)
    if said is None:
        return None
    types, n_bytes = {}, 0
    for found in _TENSOR.finditer(said):
        name = (found["to"] or found["type"]).upper()
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        n_weights = 1
        for extent in found["shape"].split(","):
            n_weights *= int(extent)
        types[found["name"]] = name
        n_bytes += n_weights // block * size
    return Flags(file_type, embedding, n_bytes, types)


def near(choices: Iterable[Flags], n_bytes: int, least: float = LEAST) -> list[Flags]:
    """Return the choices whose data take `least` to 1 of the bytes."""
    return [f for f in choices if least * n_bytes < f.n_bytes <= n_bytes]


def all_flags(
    source: Path, folder: Path, file_types: Sequence[str] = FILE_TYPES
) -> tuple[Flags, ...]:
    """Return what all flags would give; hundreds of dry runs, so the folder keeps them."""
    cache = folder / f"{source.stem}-flags.json"
    if cache.exists():
        return tuple(Flags(**each) for each in json.loads(cache.read_text()))
    pairs = [(f, e) for f in file_types for e in (None, *EMBEDDINGS)]
    with ThreadPoolExecutor(2) as pool:
        found = tuple(pool.map(lambda pair: flags(source, *pair), pairs))
    kept = tuple(each for each in found if each is not None)
    cache.write_text(json.dumps([asdict(each) for each in kept]))
    return kept
