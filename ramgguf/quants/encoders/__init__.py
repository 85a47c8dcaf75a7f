"""The encoders by name. To add one: a module with an ENCODER, and its name in ENCODERS."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator

from ramgguf.core.errors import PlanError
from ramgguf.quants.encoders import descent, gptq, rtn, search
from ramgguf.quants.encoders.encoder import Encoder

__all__ = ["DEFAULT_ENCODER", "ENCODERS", "Encoder", "EncoderName", "encoder"]

ENCODERS: Mapping[str, Encoder] = MappingProxyType(
    {e.name: e for e in (rtn.ENCODER, search.ENCODER, gptq.ENCODER, descent.ENCODER)}
)
DEFAULT_ENCODER = search.ENCODER.name


def encoder(name: str) -> Encoder:
    """Return the encoder of this name; raises PlanError that lists the known ones."""
    try:
        return ENCODERS[name]
    except KeyError:
        raise PlanError(f"encoder {name!r} is none of {', '.join(ENCODERS)}") from None


def _known(name: str) -> str:
    if name not in ENCODERS:
        raise ValueError(f"encoder {name!r} is none of {', '.join(ENCODERS)}")
    return name


EncoderName = Annotated[str, AfterValidator(_known)]
