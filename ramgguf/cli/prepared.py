"""What quantize prepares before it plans: importance, kept beside the model, and sensitivities."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

import ramgguf as api
from ramgguf.cli import options as opt
from ramgguf.deploy import MemoryRequest
from ramgguf.gguf.hub import beside
from ramgguf.gguf.reader import open_gguf
from ramgguf.gguf.shards import model_stem
from ramgguf.llama.sources import file_tag
from ramgguf.measure.result import Measurement
from ramgguf.quants import formats
from ramgguf.quants.encoders import DEFAULT_ENCODER, Encoder
from ramgguf.quants.imatrix import load_importance
from ramgguf.sensitivity.result import Sensitivity


@dataclass(frozen=True)
class Weighed:
    """The files that weight the errors."""

    imatrix: Path | None = None
    hessian: Path | None = None


def calibrated(
    model: Path,
    tokens: str,
    threads: int | None,
    terminal: opt.Terminal,
    *,
    hessians: bool,
    stand_in: str = "auto",
) -> Weighed:
    """Return the importance matrix that --calibrate asks for; what is there is taken as it is.

    Its name says its tokens: model.self.imatrix.gguf, and with hessians model.self.hessian.gguf. A
    hash stands for the contents of files.
    """
    with open_gguf(model) as file:
        tag = file_tag(tokens, file)
    imatrix = beside(model, f"{model_stem(model)}.{tag}.imatrix.gguf")
    hessian = beside(model, f"{model_stem(model)}.{tag}.hessian.gguf") if hessians else None
    if imatrix.exists() and (hessian is None or hessian.exists()):
        terminal.announce(f"taking {imatrix}; remove it to calibrate anew")
        return Weighed(imatrix, hessian)
    api.calibrate(
        model,
        imatrix,
        tokens=tokens,
        hessian=hessian,
        stand_in=opt.stand_in(stand_in),
        force=True,  # of the two, one may be there
        threads=threads,
        progress=terminal.progress,
        announce=terminal.announce,
    )
    return Weighed(imatrix, hessian)


def reweighed(
    found: Sensitivity, model: Path, weighed: Weighed, terminal: opt.Terminal
) -> Sensitivity:
    """Return the sensitivity per unit of the errors that the files weigh."""
    imatrix = load_importance(weighed.imatrix, weighed.hessian)
    wanted = imatrix.source.identity if imatrix else None
    if wanted == (found.imatrix.identity if found.imatrix else None):
        return found
    return api.reweigh(
        found,
        model,
        weighed.imatrix,
        hessian=weighed.hessian,
        progress=terminal.progress,
    )


def with_projector(request: MemoryRequest | None, found: Measurement | None) -> MemoryRequest:
    """Return the request with a projector that is planned as well; found is its measurement.

    Raises a usage error where there is no projector.
    """
    if request is None or request.beside.mmproj is None:
        raise typer.BadParameter(
            "name the projector that shares the memory: --memory SIZE --mmproj FILE",
            param_hint="--mmproj",
        )
    return replace(request, beside=replace(request.beside, projector=found))


def measured_projector(
    mmproj: Path,
    names: Sequence[str] | None,
    encoder: Encoder,
    threads: int | None,
    terminal: opt.Terminal,
    *,
    allow_requantize: bool,
) -> Measurement:
    """Return what was measured of a projector, which has no matrix and no Hessians of its own."""
    usable = [name for name in names or () if name not in formats.with_importance()]
    return api.measure(
        terminal.fetched(mmproj),
        formats=usable or None,
        encoder=DEFAULT_ENCODER if encoder.needs_hessian else encoder.name,
        allow_requantize=allow_requantize,
        threads=threads,
        progress=terminal.progress,
    )
