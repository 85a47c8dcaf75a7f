"""Which model a value was made from: a hash of a sample of its data identifies it anywhere.

Two fine-tunes of one base have the same header and the same size. What was measured of one is wrong
for the other, so that values are bound to a hash of the data; a sample of them is enough, and is
read in a moment (docs/reliability.md says what it costs).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from ramgguf.core.documents import FrozenModel, Positive
from ramgguf.core.errors import EngineError, GGUFError, PlanError
from ramgguf.core.values import HubFile
from ramgguf.gguf.hub import origin_of
from ramgguf.gguf.reader import GGUFFile, open_gguf


@dataclass(frozen=True)
class FileIdentity:
    """A model's file: header_sha256 covers the bytes before the tensor data, sample_sha256 a sample
    of the data (GGUFFile.sample_sha256).
    """

    path: str
    n_bytes: int
    header_sha256: str
    sample_sha256: str | None

    @classmethod
    def of(cls, file: GGUFFile) -> "FileIdentity":
        """Return the identity of an open file."""
        path = str(file.paths[0].absolute())
        return cls(path, file.n_bytes, file.header_sha256, file.sample_sha256)


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
                f"{expected.path} is another file: {difference(found, expected)}; "
                "every worker must see the same model"
            )
    except BaseException:
        file.close()
        raise
    return file


class Source(FrozenModel):
    """Which model a value was made from.

    header_sha256 covers the bytes before the tensor data, sample_sha256 a sample of the data (None
    in files of versions that did not take one), data_sha256 all of them, where they were read. hub
    is which file of the hub it is, where it lies in the hub's cache.
    """

    path: str
    n_bytes: Positive
    header_sha256: str
    sample_sha256: str | None = None
    data_sha256: str | None = None
    architecture: str
    name: str | None = None
    hub: HubFile | None = None

    @classmethod
    def of(cls, file: GGUFFile, data_sha256: str | None = None) -> Self:
        """Return that of an open model."""
        return cls(
            path=str(file.paths[0]),
            n_bytes=file.n_bytes,
            header_sha256=file.header_sha256,
            sample_sha256=file.sample_sha256,
            data_sha256=data_sha256,
            architecture=file.architecture,
            name=file.name,
            hub=origin_of(file.paths[0]),
        )


class Identified(Protocol):
    """A model's file, or what is known of one; sample_sha256 None where that is not."""

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""

    @property
    def header_sha256(self) -> str:
        """Over the bytes before the tensor data."""

    @property
    def sample_sha256(self) -> str | None:
        """Over a sample of the data."""


def difference(found: Identified, expected: Identified) -> str | None:
    """Return how the models differ, found first; None if they are the same as far as is known.

    Where one of the two has no sample of the data, headers and sizes are all that is compared.
    """
    if found.n_bytes != expected.n_bytes:
        return f"{found.n_bytes} bytes, expected {expected.n_bytes}"
    if found.header_sha256 != expected.header_sha256:
        hashes = found.header_sha256[:12], expected.header_sha256[:12]
        return "its header's SHA-256 is {}…, expected {}…".format(*hashes)
    if expected.sample_sha256 is None or found.sample_sha256 in (None, expected.sample_sha256):
        return None
    return "the same header, but other weights"


def require_model(what: str, source: Source, model: GGUFFile | Source) -> None:
    """Raise PlanError unless the value was made from this model; what names the value."""
    differs = difference(model, source)
    if differs is not None:
        path = model.path if isinstance(model, Source) else model.paths[0]
        raise PlanError(
            f"{what} is of {source.path}, another model than {path} ({differs}); make it again "
            "from this model"
        )


def unsure(what: str, source: Source) -> tuple[str, ...]:
    """Return a note if only header and size identify the value's model, nothing otherwise."""
    if source.sample_sha256 is not None:
        return ()
    note = f"{what} has no hash of its model's data (an older version wrote it): "
    return (note + "that it is of this model was checked by header and size only",)
