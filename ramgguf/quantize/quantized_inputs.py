"""A file whose weights are rounded anew, layer by layer, for what the rounded ones before put out.

The formats are those of the file (quants/correction.py says how its weights change). What a killed
run has done is gone on with.
"""

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from ramgguf.core.documents import FrozenModel
from ramgguf.core.errors import EngineError
from ramgguf.core.line_journal import LineJournal
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Progress, Silent
from ramgguf.core.version import __version__
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.llama.child import Child
from ramgguf.llama.layer_rounding_protocol import (
    LayerRounded,
    OpenRounding,
    RoundingOpened,
    RoundLayer,
    SkipLayer,
)
from ramgguf.plan.result import Plan, QuantizedInputs
from ramgguf.quantize.pipeline import Quantized, as_planned
from ramgguf.quantize.verify import with_written_errors
from ramgguf.quants.encoders import encoder
from ramgguf.quants.imatrix import planned_imatrix

_WORKER = "ramgguf.llama.layer_rounding_worker"


class _Settings(FrozenModel):
    """What a journal is of."""

    key: str


@dataclass(frozen=True)
class Rounding:
    """How layers are rounded: for the tokens of a matrix, at `partial` until it is done, with a
    copy of the model in `scratch`.
    """

    inputs: QuantizedInputs
    partial: Path
    scratch: Path
    threads: int | None = None
    progress: Progress | None = None


def round_layers(model: Path, made: Quantized, rounding: Rounding) -> Quantized:
    """Return the file at rounding.partial: as what was made, rounded for its quantized inputs.

    What was made must be by error feedback, in one file. The plan of what is returned says what was
    done, and has the errors of what was written. Raises EngineError where llama.cpp cannot run the
    layers one by one, or where no tensor would be rounded.
    """
    path, plan = rounding.partial, made.plan
    with open_gguf(model) as plain:
        file = as_planned(plain, plan)
        names = _rounded_names(file, plan)
        if not names:
            raise EngineError("no weight is rounded with error feedback")
        key = f"{__version__} {file.sample_sha256} {plan.sha256()} {rounding.inputs}"
        journal_path = path.with_name(f"{path.name}.journal")
        settings = _Settings(key=hashlib.sha256(key.encode()).hexdigest())
        if not _is_of(journal_path, settings) or not path.exists():
            journal_path.unlink(missing_ok=True)
            shutil.copyfile(made.paths[0], path)
        journal: LineJournal[_Settings, LayerRounded]
        with LineJournal(journal_path, _Settings, LayerRounded, "rounding") as journal:
            if journal.settings is None:
                journal.begin(settings)
            _run(model, plan, names, rounding, journal)
        plan = plan.model_copy(update={"quantized_inputs": rounding.inputs})
        with open_gguf(path) as written:
            threads = rounding.threads or default_threads()
            plan = with_written_errors(file, plan, written, threads=threads, progress=Silent())
    return Quantized((path,), path.stat().st_size, plan, made.measurement, None, {})


def forget(partial: Path) -> None:
    """Remove what a run has left there."""
    for path in (partial, partial.with_name(f"{partial.name}.journal")):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _rounded_names(file: GGUFFile, plan: Plan) -> tuple[str, ...]:
    """Return the tensors that error feedback has rounded."""
    imatrix, chosen = planned_imatrix(plan.imatrix), encoder(plan.encoder)
    hessians = imatrix.hessians if imatrix else None
    if hessians is None:
        return ()
    with closing(hessians):
        return tuple(
            a.name
            for a, encoded in zip(plan.assignments, plan.encoded, strict=True)
            if encoded
            and not a.is_exact
            and chosen.encodes_output(a.format)
            and len(file.tensor(a.name).shape) == 2
            and hessians.owner(a.name) is not None
        )


def _is_of(path: Path, settings: _Settings) -> bool:
    """Return whether the journal there is of a run with these settings."""
    with suppress(OSError, ValueError):
        first = path.read_bytes().partition(b"\n")[0]
        return _Settings.model_validate_json(first) == settings
    return False


def _run(
    model: Path,
    plan: Plan,
    names: Sequence[str],
    rounding: Rounding,
    journal: LineJournal[_Settings, LayerRounded],
) -> None:
    assert plan.imatrix is not None  # names have Hessians
    inputs, shown = rounding.inputs, rounding.progress or Silent()
    opening = OpenRounding(
        path=str(model), imatrix=plan.imatrix,
        quantized=str(rounding.partial), folder=str(rounding.scratch), names=tuple(names),
        encoder=plan.encoder, tokens=inputs.tokens,
        n_sequences=inputs.n_sequences, n_ctx=inputs.n_ctx,
        n_threads=rounding.threads or default_threads(),
    )  # fmt: skip
    with Child(_WORKER) as child:
        n_layers = child.ask(opening, RoundingOpened).n_layers
        shown.start("layers", n_layers, "layers")
        try:
            done = {step.layer: step for step in journal.steps}
            for layer in range(n_layers):
                step = done.get(layer)
                if step is None:
                    found = child.ask(RoundLayer(layer=layer), LayerRounded)
                else:
                    skip = SkipLayer(layer=layer, names=step.names, checksum=step.checksum)
                    found = child.ask(skip, LayerRounded)
                if found != step:  # the rest follows from it
                    done = {}
                    journal.add(found)
                shown.advance(1)
        finally:
            shown.finish()
