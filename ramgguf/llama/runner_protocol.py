"""The messages between a worker and its child with a LocalRunner: one JSON object per line."""

import base64
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from ramgguf.core.documents import FrozenModel
from ramgguf.llama.protocol import Draw, SystemInfo
from ramgguf.quants.imatrix import ImportanceSource


class OpenRunner(FrozenModel):
    """Load a copy of the model, or a stand-in, made in `folder`; answered by RunnerOpened."""

    kind: Literal["open"] = "open"
    path: str
    n_ctx: int
    n_threads: int
    encoder: str
    imatrix: ImportanceSource | None = None
    folder: str | None = None
    stand_in: str | None = None


class AboutRunner(FrozenModel):
    """Ask again what is open; answered by RunnerOpened."""

    kind: Literal["about"] = "about"


class RunnerOpened(FrozenModel):
    """Which llama.cpp runs the copy; tokens in the model's vocabulary.

    reload_seconds is None where passes begin at the first layer only.
    """

    kind: Literal["opened"] = "opened"
    system: SystemInfo
    n_vocab: int
    reload_seconds: float | None = None


class DrawIds(Draw):
    """Draw sequences, of these numbers or in sets of these sizes; answered by DrawnIds."""

    indices: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    first: int = 0


class DrawnIds(FrozenModel):
    """The sequences, set after set."""

    kind: Literal["drawn"] = "drawn"
    ids: tuple[str, ...]
    seconds: float


class Prepare(FrozenModel):
    """Decode sequences with the original's weights; answered by Prepared."""

    kind: Literal["prepare"] = "prepare"
    ids: tuple[str, ...]


class Prepared(FrozenModel):
    """The fingerprint of the original's logits, for each sequence."""

    kind: Literal["prepared"] = "prepared"
    fingerprints: tuple[str, ...]


class Compare(FrozenModel):
    """Decode sequences while tensors have other formats; answered by Compared.

    prepared are all sequences of the run: they are decoded with the original's weights first.
    start is the layer at which the pass may begin, end the one after which it ends, if it does.
    """

    kind: Literal["compare"] = "compare"
    ids: tuple[str, ...]
    changes: tuple[tuple[str, str], ...] = ()
    prepared: tuple[str, ...] = ()
    start: int = 0
    end: int | None = None


class Compared(FrozenModel):
    """KLD of every token (base64 of little-endian float64), NMSE of every change, seconds.

    Of a pass that ends at a layer, errors of the residual stream instead of KLD, in the same form.
    why_whole says why the pass began at the first layer, where another was asked for.
    """

    kind: Literal["compared"] = "compared"
    kld: str
    nmse: tuple[float, ...]
    fingerprints: tuple[str, ...]
    seconds: float
    why_whole: str | None = None
    errors: str | None = None


AnyRunnerRequest = OpenRunner | AboutRunner | DrawIds | Prepare | Compare
RunnerRequestAdapter: TypeAdapter[AnyRunnerRequest] = TypeAdapter(
    Annotated[AnyRunnerRequest, Field(discriminator="kind")]
)


def pack_float64(values: NDArray[np.float64]) -> str:
    """Return base64 of the values as little-endian float64."""
    return base64.b64encode(values.astype("<f8").tobytes()).decode("ascii")


def unpack_float64(text: str) -> NDArray[np.float64]:
    """Return the values that pack_float64 wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)
