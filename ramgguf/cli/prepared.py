"""What quantize measures before it plans, and keeps beside the model: importance, sensitivity."""

import re
from pathlib import Path

from ramgguf import api
from ramgguf.cli import options as opt
from ramgguf.schema import Encoder
from ramgguf.sensitivities import Sensitivity


def calibrated(
    model: Path, tokens: str | None, threads: int | None, terminal: opt.Terminal
) -> Path | None:
    """Return the importance matrix that --calibrate asks for; what is there is taken as it is.

    Its name says its tokens: model.self.imatrix.gguf.
    """
    if tokens is None:
        return None
    tag = re.sub(r"[^\w.-]", "_", Path(tokens).stem)
    path = model.with_suffix(f".{tag}.imatrix.gguf")
    if path.exists():
        terminal.err.print(f"taking {path}; remove it to calibrate anew", soft_wrap=True)
        return path
    api.calibrate(
        model,
        path,
        tokens=tokens,
        threads=threads,
        progress=terminal.progress,
        announce=terminal.err.print,
    )
    return path


def sensed(
    model: Path,
    asked: str | None,
    encoder: Encoder,
    imatrix: Path | None,
    threads: int | None,
    terminal: opt.Terminal,
) -> Sensitivity | None:
    """Return what --sensitivity asks for; what is measured is kept beside the model."""
    if asked is None:
        return None
    weighed = "" if imatrix is None else f".{imatrix.name.removesuffix('.gguf')}"
    path = model.with_suffix(f"{weighed}.sens.json") if asked == "measure" else Path(asked)
    if asked != "measure" or path.exists():
        return Sensitivity.load(path)
    journal = path.with_name(f"{path.name}.partial")
    found = api.sensitivity(
        model,
        encoder=encoder,
        imatrix=imatrix,
        journal=journal,
        threads=threads,
        progress=terminal.progress,
        announce=terminal.err.print,
    )
    found.save(path)
    journal.unlink(missing_ok=True)
    return found
