"""A file whose weights are rounded anew, layer by layer, for what the rounded ones before put out.

The formats are those of the file (quants/correction.py says how its weights change). What a killed
run has done is gone on with.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
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
from ramgguf.quants.hessian import load_hessians

_WORKER = "ramgguf.llama.layer_rounding_worker"


class _Settings(FrozenModel):
    """What a journal is of."""

    key: str


_Journal = LineJournal[_Settings, LayerRounded]


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


@contextmanager
def rounded_layers(model: Path, made: Quantized, rounding: Rounding) -> Iterator[Quantized]:
    """Yield what was made, rounded for its quantized inputs: the file at rounding.partial.

    What was made must be by error feedback, in one file. The plan of what is yielded says what was
    done, and has the errors of what was written. The file is removed at the end, and kept if this
    process is killed or interrupted. Raises EngineError where llama.cpp cannot run the layers one
    by one, or where no tensor would be rounded, PlanError where another process does the same.
    """
    path = rounding.partial
    journal_path = path.with_name(f"{path.name}.journal")
    journal: _Journal
    with (
        open_gguf(model) as plain,
        LineJournal(journal_path, _Settings, LayerRounded, "rounding") as journal,
    ):
        try:
            yield _rounded(as_planned(plain, made.plan), made, rounding, journal)
        except Exception:
            _remove(path, journal_path)
            raise
        _remove(path, journal_path)


def _rounded(file: GGUFFile, made: Quantized, rounding: Rounding, journal: _Journal) -> Quantized:
    path, plan = rounding.partial, made.plan
    names = _rounded_names(file, plan)
    if not names:
        raise EngineError("no weight is rounded with error feedback")
    key = f"{__version__} {file.sample_sha256} {plan.sha256()} {rounding.inputs}"
    settings = _Settings(key=hashlib.sha256(key.encode()).hexdigest())
    if journal.settings != settings or not path.exists():
        shutil.copyfile(made.paths[0], path)
        journal.begin(settings)
    _run(file.paths[0], plan, names, rounding, journal)
    plan = plan.model_copy(update={"quantized_inputs": rounding.inputs})
    with open_gguf(path) as written:
        threads = rounding.threads or default_threads()
        plan = with_written_errors(file, plan, written, threads=threads, progress=Silent())
    return Quantized((path,), path.stat().st_size, plan, made.measurement, None, {})


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _rounded_names(file: GGUFFile, plan: Plan) -> tuple[str, ...]:
    """Return the tensors that error feedback has rounded."""
    chosen, path = encoder(plan.encoder), plan.imatrix.hessian_path if plan.imatrix else None
    if path is None:
        return ()
    with closing(load_hessians(Path(path))) as hessians:  # the child sees that they are the plan's
        return tuple(
            a.name
            for a, encoded in zip(plan.assignments, plan.encoded, strict=True)
            if encoded
            and not a.is_exact
            and chosen.encodes_output(a.format)
            and len(file.tensor(a.name).shape) == 2
            and hessians.owner(a.name) is not None
        )


def _run(
    model: Path,
    plan: Plan,
    names: Sequence[str],
    rounding: Rounding,
    journal: _Journal,
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
