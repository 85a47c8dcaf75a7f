"""The metadata in which a quantized model differs from its source."""

from ramgguf.core.values import HubFile
from ramgguf.core.version import __version__
from ramgguf.gguf.header import Value, string, u32, u64
from ramgguf.gguf.hub import origin_of
from ramgguf.gguf.layout import planned_header_bytes
from ramgguf.gguf.reader import GGUFFile
from ramgguf.quants import formats
from ramgguf.quants.imatrix import ImportanceSource, imatrix_keys

_UNKNOWN = "0" * 64


def output_metadata(
    *,
    imatrix: ImportanceSource | None,
    hub: HubFile | None,
    most_format: str = "F32",
    budget: int = 0,
    plan_sha256: str | None = None,
    data_sha256: str | None = None,
) -> dict[str, Value]:
    """Return the metadata of an output, most of whose bytes are in most_format.

    Every value has a fixed length, so the header's bytes are known before there is a plan: the
    defaults then stand in for what it will say.
    """
    return {
        "general.file_type": u32(formats.file_type(most_format)),
        "general.quantization_version": u32(formats.QUANTIZATION_VERSION),
        "ramgguf.version": string(__version__),
        "ramgguf.budget": u64(budget),
        "ramgguf.plan_sha256": string(plan_sha256 or _UNKNOWN),
        "ramgguf.source_sha256": string(data_sha256 or _UNKNOWN),
        **(_hub_keys(hub) if hub else {}),
        **(imatrix_keys(imatrix) if imatrix else {}),
    }


def overhead_bytes(file: GGUFFile, imatrix: ImportanceSource | None) -> int:
    """Return the bytes of the header that an output of this model will have."""
    metadata = output_metadata(imatrix=imatrix, hub=origin_of(file.paths[0]))
    return planned_header_bytes(file, {}, metadata)


def _hub_keys(origin: HubFile) -> dict[str, Value]:
    """Return the metadata that say which file of the hub was quantized."""
    return {
        "ramgguf.source_repo": string(origin.repo),
        "ramgguf.source_revision": string(origin.revision),
        "ramgguf.source_file": string(origin.file),
    }
