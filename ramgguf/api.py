"""The Python interface: each function is one command, from files to values and files."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Unpack

from ramgguf import formats as _formats
from ramgguf.calibrating import calibrate, perturb
from ramgguf.corpus import Recipe, default_corpus, text_file
from ramgguf.corpus import dataset as dataset_corpus
from ramgguf.destinations import check_destination, default_output
from ramgguf.errors import EngineError, PlanError
from ramgguf.feedback import fed_back, first_measure
from ramgguf.format_sets import expand
from ramgguf.gguf_io import GGUFFile, open_gguf
from ramgguf.gguf_layout import planned_header_bytes
from ramgguf.hub import beside, local_path, origin_of
from ramgguf.imatrix import Imatrix
from ramgguf.memory import MemoryRequest, Room
from ramgguf.parallel import default_threads
from ramgguf.planning import (
    DEFAULT_MIN_SQNR_DB,
    PlanOptions,
    budget_bytes,
    curve,
    diff,
    explain,
    follow,
    plan,
    plan_on,
    plan_on_within,
    plan_within,
)
from ramgguf.progress import Clock, Progress, Silent
from ramgguf.refining import refine as refine_plan
from ramgguf.refining import refinement_journal
from ramgguf.schema import Encoder, Measurement, Plan
from ramgguf.screening import MANY_WEIGHTS, measure_and_plan
from ramgguf.sensing import reweigh, sensitivity, weighed_by
from ramgguf.shard_plans import plan_for_shards
from ramgguf.stages import evaluate as _evaluate
from ramgguf.stages import measure as _measure
from ramgguf.stages import quantize as _quantize
from ramgguf.stages import verify as _verify
from ramgguf.stages.evaluate import Evaluation

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_MIN_SQNR_DB",
    "MemoryRequest",
    "PlanOptions",
    "Quantized",
    "calibrate",
    "curve",
    "default_output",
    "diff",
    "evaluate",
    "explain",
    "follow",
    "measure",
    "perturb",
    "plan",
    "plan_on",
    "plan_on_within",
    "plan_within",
    "quantize",
    "refine_plan",
    "reweigh",
    "sensitivity",
    "weighed_by",
]

DEFAULT_ENCODER: Encoder = "search"


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made: the files, the plan they follow and the seconds of each stage.

    measurement is None when the plan was given, and may lack formats that a sample of a tensor
    showed not to be worth their bytes. worst_departure is the largest relative difference between
    planned and written NMSE, None when the output was not verified.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    plan: Plan
    measurement: Measurement | None
    worst_departure: float | None
    seconds: dict[str, float]


def measure(
    model: str | Path,
    *,
    formats: Sequence[str] | None = None,
    encoder: Encoder = DEFAULT_ENCODER,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Return the rate–distortion curves of all tensors of a GGUF model.

    model is a path or hf://ORG/REPO/FILE.gguf, on the hub. formats are the names to try, by
    default all that need no calibration data. imatrix is a file of llama-imatrix, GGUF or .dat:
    errors are then weighed by the importance of the columns; with a file of Hessians they are those
    of the outputs, and the encoder can be gptq.
    Raises GGUFError for a file that is malformed or no language model, FormatError for weights that
    are not finite or a format that does not exist, ImatrixError for an unfit imatrix.
    """
    wanted = None if formats is None else expand(formats)
    for name in wanted or ():
        _formats.get(name)
    weighed = weighed_by(imatrix, hessian, encoder)
    with open_gguf(local_path(model), kind_check=True) as file:
        return _measure.measure(
            file,
            n_overhead_bytes=_overhead_bytes(file, weighed),
            wanted=wanted,
            encoder=encoder,
            imatrix=weighed,
            allow_requantize=allow_requantize,
            threads=threads or default_threads(),
            progress=progress or Silent(),
        )


def quantize(
    model: str | Path,
    budget: int | str | None = None,
    output: str | Path | None = None,
    *,
    from_plan: Plan | None = None,
    measurement: Measurement | None = None,
    encoder: Encoder = DEFAULT_ENCODER,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    allow_requantize: bool = False,
    refine: int = 0,
    memory: MemoryRequest | None = None,
    split_max_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
    **options: Unpack[PlanOptions],
) -> Quantized:
    """Write the best GGUF that fits the budget and return what was made.

    Needs a budget, memory (with or without a budget) or a ready plan; a ready measurement saves
    measuring again; options are those of plan, imatrix and hessian are as in measure. Without a
    ready plan, refine is how many swaps of formats are tried by forward passes, whose cost announce
    is told, on the workers of an executor if there is one. With the encoder gptq and no ready plan
    or measurement, formats are chosen by the errors of search, and a sensitivity must suit these:
    without Hessians. output is by default beside the model and named after the plan's bits per
    weight.
    Raises RamggufError; an older output is then untouched.
    """
    clock, n_threads, shown = Clock(), threads or default_threads(), progress or Silent()
    journal: Path | None = None
    feed_back: Callable[[Plan], Plan] | None = None
    model = local_path(model)
    wanted_path = Path(output) if output is not None else beside(model, model.name)
    with open_gguf(model, kind_check=True) as file, ExitStack() as stack:
        if from_plan is not None and budget is None and memory is None:
            made = from_plan
        elif from_plan is None and (budget is not None or memory is not None):
            most = None if budget is None else budget_bytes(budget, file.n_weights, file.n_bytes)
            room = Room.of(file, most, memory, stack)
            n_bytes = room.n_bytes
            check_destination(wanted_path, output is not None and not force, n_bytes)
            shards = partial(plan_for_shards, file, options, split_max_bytes)

            def plan_it(measured: Measurement) -> Plan:
                return room.plan(partial(shards, measured))

            if measurement is not None:
                with clock.stage("plan"):
                    made = plan_it(measurement)
            else:
                weighed = weighed_by(imatrix, hessian, encoder)
                measure_it = partial(
                    _measure.measure,
                    file,
                    n_overhead_bytes=_overhead_bytes(file, weighed),
                    allow_requantize=allow_requantize,
                    threads=n_threads,
                    progress=shown,
                )
                wanted = expand(names) if (names := options.get("formats")) else None
                measurement, made = measure_and_plan(
                    first_measure(measure_it, encoder, weighed, wanted),
                    plan_it,
                    options,
                    clock.stage,
                    screens=file.n_weights >= MANY_WEIGHTS,
                )
                if encoder == "gptq":
                    feed_back = partial(fed_back, measure=measure_it, imatrix=weighed)
            if refine:
                journal = refinement_journal(wanted_path, made)
                with clock.stage("refine"):
                    made = refine_plan(
                        model,
                        made,
                        measurement,
                        n_trials=refine,
                        sensitivity=options.get("sensitivity"),
                        imatrix=imatrix,
                        journal=journal,
                        threads=n_threads,
                        executor=executor,
                        progress=shown,
                        announce=announce,
                    )
            if feed_back is not None:
                with clock.stage("feed back"):
                    made = feed_back(made)
        else:
            raise PlanError("either a budget, memory or a plan is needed, and not both")
        path = Path(output) if output is not None else default_output(model, made)
        destination = _quantize.Destination(path, force, split_max_bytes)
        worst = None
        with _quantize.begin(file, made, destination) as out:
            with clock.stage("write"):
                _quantize.write(file, made, out, threads=n_threads, progress=shown)
            if verify:
                with clock.stage("verify"), out.written() as written:
                    worst = _verify.verify(file, made, written, threads=n_threads, progress=shown)
            with clock.stage("flush"):
                paths = out.commit()
    if journal is not None:
        journal.unlink(missing_ok=True)
    n_written = sum(p.stat().st_size for p in paths)
    return Quantized(paths, n_written, made, measurement, worst, clock.seconds)


def evaluate(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    *,
    protocol: Literal["ram", "llama"] = "ram",
    n_ctx: int | None = None,
    n_seq: int | None = None,
    seed: int = 42,
    bos: bool = False,
    text: str | Path | None = None,
    dataset: str | None = None,
    split: str = "test",
    safe_kernels: bool | None = None,
    jsonl: str | Path | None = None,
    resume: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    verbose: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Return the scores of models on a text, by llama.cpp, sequence by sequence.

    The text is the WikiText-2 test split unless text (a file) or dataset (a name on the hub, with
    split) is given. With a reference, KLD and the like are measured against it. Raises EngineError
    when nothing could be scored; a model that fails midway leaves its finished sequences. Where
    llama.cpp's repacked kernels crash (safe_kernels None), all models are scored without them.
    With an executor, its workers score the sequences (docs/scale.md), with `threads` threads each.
    """
    if text is not None and dataset is not None:
        raise EngineError("either a text or a dataset can be scored, not both")
    corpus = default_corpus()
    if text is not None:
        corpus = text_file(Path(text))
    elif dataset is not None:
        corpus = dataset_corpus(dataset, split=split)
    return _evaluate.evaluate(
        [local_path(m) for m in models],
        reference=local_path(reference) if reference is not None else None,
        recipe=Recipe(corpus, protocol, n_ctx=n_ctx, n_seq=n_seq, seed=seed, bos=bos),
        threads=threads or default_threads(),
        safe_kernels=safe_kernels,
        verbose=verbose,
        jsonl=Path(jsonl) if jsonl is not None else None,
        resume=resume,
        executor=executor,
        progress=progress,
    )


def _overhead_bytes(file: GGUFFile, imatrix: Imatrix | None) -> int:
    source, hub = imatrix.source if imatrix else None, origin_of(file.paths[0])
    return planned_header_bytes(file, {}, _quantize.planned_metadata(None, source, hub))
