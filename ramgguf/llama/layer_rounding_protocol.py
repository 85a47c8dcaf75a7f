"""The messages between quantize and its child that rounds layers: one JSON object per line."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.quants.imatrix import ImportanceSource


class OpenRounding(FrozenModel):
    """Load the model, to round these tensors of a quantized file; answered by RoundingOpened.

    folder takes a copy of the model. imatrix names Hessians, and scales where the model is rounded
    with these in it. tokens, n_sequences of n_ctx each, are named as in sources.py.
    """

    kind: Literal["open"] = "open"
    path: str
    imatrix: ImportanceSource
    quantized: str
    folder: str
    names: tuple[str, ...]
    encoder: str
    tokens: str
    n_sequences: int
    n_ctx: int
    n_threads: int


class RoundingOpened(FrozenModel):
    """The model is loaded, and has so many layers to be rounded."""

    kind: Literal["opened"] = "opened"
    n_layers: int


class RoundLayer(FrozenModel):
    """Round the next layer, of this number; answered by LayerRounded."""

    kind: Literal["round"] = "round"
    layer: int


class SkipLayer(FrozenModel):
    """Take the next layer as an earlier run has rounded it; answered by LayerRounded.

    names and checksum are those of that run's answer; where the file holds other blocks, the layer
    is rounded anew.
    """

    kind: Literal["skip"] = "skip"
    layer: int
    names: tuple[str, ...]
    checksum: int


class LayerRounded(FrozenModel):
    """The tensors that were rounded, and the checksum of their blocks."""

    kind: Literal["rounded"] = "rounded"
    layer: int
    names: tuple[str, ...]
    checksum: int


AnyRoundingRequest = OpenRounding | RoundLayer | SkipLayer
RoundingRequestAdapter: TypeAdapter[AnyRoundingRequest] = TypeAdapter(
    Annotated[AnyRoundingRequest, Field(discriminator="kind")]
)
