"""Which file a model is, told so that another machine can see whether it has the same."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.documents import FrozenModel, Positive
from ramgguf.core.errors import EngineError, GGUFError
from ramgguf.core.values import HubFile
from ramgguf.gguf.reader import GGUFFile, open_gguf

N_SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class FileIdentity:
    """A model's file: header_sha256 covers the bytes before the tensor data, sample_sha256 some of
    the data, from tensors all over the file: fine-tuned models differ in nothing else.
    """

    path: str
    n_bytes: int
    header_sha256: str
    sample_sha256: str

    @classmethod
    def of(cls, file: GGUFFile) -> "FileIdentity":
        """Return the identity of an open file."""
        path = str(file.paths[0].absolute())
        return cls(path, file.n_bytes, file.header_sha256, _sample_sha256(file))


def same_file(expected: FileIdentity) -> GGUFFile:
    """Return the file, opened. Raises EngineError when it is not there, or is another one."""
    try:
        file = open_gguf(Path(expected.path))
    except GGUFError as e:
        raise EngineError(f"{e}; every worker must see the model under the same path") from None
    try:
        found = FileIdentity.of(file)
        if found != expected:
            raise EngineError(
                f"{expected.path} is another file: {_differences(found, expected)}; "
                "every worker must see the same model"
            )
    except BaseException:
        file.close()
        raise
    return file


def _sample_sha256(file: GGUFFile) -> str:
    digest = hashlib.sha256()
    step = max(1, len(file.tensors) // N_SAMPLES)
    for tensor in file.tensors[::step]:
        row = tensor.n_rows // 2
        digest.update(file.read_rows(tensor, row, row + 1).tobytes()[:SAMPLE_BYTES])
    return digest.hexdigest()


def _differences(found: FileIdentity, expected: FileIdentity) -> str:
    if found.n_bytes != expected.n_bytes:
        return f"{found.n_bytes} bytes, expected {expected.n_bytes}"
    if found.header_sha256 != expected.header_sha256:
        hashes = found.header_sha256[:12], expected.header_sha256[:12]
        return "its header's SHA-256 is {}…, expected {}…".format(*hashes)
    return "the same header, but other weights"


class Source(FrozenModel):
    """Which model a value was made from; header_sha256 and n_bytes tell models apart quickly.

    hub is which file of the hub it is, where it lies in the hub's cache.
    """

    path: str
    n_bytes: Positive
    header_sha256: str
    data_sha256: str | None = None
    architecture: str
    name: str | None = None
    hub: HubFile | None = None
