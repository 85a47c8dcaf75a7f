"""From a model and a limit to a file: measure, plan, refine, feed back, write, verify."""

from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from ramgguf.core.errors import PlanError
from ramgguf.core.inputs import protected
from ramgguf.core.parallel import default_threads
from ramgguf.core.progress import Clock, Progress, Silent
from ramgguf.evaluate import HeldOutScore
from ramgguf.gguf.hub import beside, local_path
from ramgguf.gguf.identity import require_model
from ramgguf.gguf.reader import GGUFFile, open_gguf
from ramgguf.measure import measure_file
from ramgguf.measure.result import Measurement
from ramgguf.plan import PlanOptions, SizeLimit, SourceSize, size_limit
from ramgguf.plan.result import Plan
from ramgguf.quantize.feedback import fed_back, first_measure
from ramgguf.quantize.output_paths import check_destination, default_output
from ramgguf.quantize.preselection import MANY_WEIGHTS, measure_and_plan
from ramgguf.quantize.shard_plans import plan_for_shards
from ramgguf.quantize.verify import verify as verify_file
from ramgguf.quantize.write import Destination, begin, settled, write
from ramgguf.quants.encoders import DEFAULT_ENCODER, ENCODERS, EncoderName
from ramgguf.quants.formats import expand
from ramgguf.quants.imatrix import load_importance
from ramgguf.quants.output_metadata import overhead_bytes
from ramgguf.refine import refine as refine_plan
from ramgguf.refine import refinement_journal


@dataclass(frozen=True)
class Quantized:
    """What `quantize` made: the files, the plan they follow and the seconds of each stage.

    measurement is None when the plan was given, and may lack formats that a sample of a tensor
    showed not to be worth their bytes. worst_departure is the largest relative difference between
    planned and written NMSE, None when the output was not verified. score is on held-out text,
    None where none was asked for, or llama.cpp could not score.
    """

    paths: tuple[Path, ...]
    n_bytes: int
    plan: Plan
    measurement: Measurement | None
    worst_departure: float | None
    seconds: dict[str, float]
    score: HeldOutScore | None = None


@protected()
def quantize_once(
    model: str | Path,
    budget: int | str | SizeLimit | None = None,
    output: str | Path | None = None,
    *,
    from_plan: Plan | None = None,
    measurement: Measurement | None = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    imatrix: str | Path | None = None,
    hessian: str | Path | None = None,
    allow_requantize: bool = False,
    refine: int = 0,
    refine_beside: Path | None = None,
    split_max_bytes: int | None = None,
    force: bool = False,
    verify: bool = True,
    threads: int | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _: None,
    **options: Unpack[PlanOptions],
) -> Quantized:
    """Write what these options say and return what was made; effort.quantize explains them.

    The journal of a refinement is kept beside refine_beside, by default beside the output.
    """
    if (budget is None) == (from_plan is None):
        raise PlanError("either a budget, memory or a plan is needed, and not both")
    model = local_path(model)
    with open_gguf(model, kind_check=True) as file:
        run = _Run(
            model=model,
            file=file,
            output=None if output is None else Path(output),
            encoder=encoder,
            imatrix=imatrix,
            hessian=hessian,
            allow_requantize=allow_requantize,
            split_max_bytes=split_max_bytes,
            force=force,
            threads=threads or default_threads(),
            executor=executor,
            progress=progress or Silent(),
            announce=announce,
            options=options,
        )
        if from_plan is not None:
            return run.written(from_plan, None, verify=verify)
        assert budget is not None
        measurement, plan = run.planned(size_limit(budget), measurement)
        journal = None
        if refine:
            plan, journal = run.refined(plan, measurement, refine, refine_beside)
        plan = run.fed_back(plan)
        made = run.written(plan, measurement, verify=verify)
    if journal is not None:
        journal.unlink(missing_ok=True)
    return made


class _Run:
    """One run of `quantize`: its options, and the time of each of its stages."""

    def __init__(
        self,
        *,
        model: Path,
        file: GGUFFile,
        output: Path | None,
        encoder: str,
        imatrix: str | Path | None,
        hessian: str | Path | None,
        allow_requantize: bool,
        split_max_bytes: int | None,
        force: bool,
        threads: int,
        executor: Executor | None,
        progress: Progress,
        announce: Callable[[str], None],
        options: PlanOptions,
    ) -> None:
        self._model, self._file, self._output = model, file, output
        self._encoder, self._imatrix, self._hessian = ENCODERS[encoder], imatrix, hessian
        self._allow_requantize = allow_requantize
        self._split_max_bytes, self._force = split_max_bytes, force
        self._threads, self._executor = threads, executor
        self._progress, self._announce = progress, announce
        self._options = options
        self._clock = Clock()
        self._feed_back: Callable[[Plan], Plan] | None = None

    def planned(
        self, limit: SizeLimit, measurement: Measurement | None
    ) -> tuple[Measurement, Plan]:
        """Return the plan that keeps to the limit, and what was measured for it."""
        with ExitStack() as stack:
            room = stack.enter_context(limit.room(SourceSize.of(self._file)))
            wanted = self._output or beside(self._model, self._model.name)
            most = min(room.n_bytes, self._file.n_bytes)  # a budget may be more than the source
            check_destination(wanted, self._output is not None and not self._force, most)
            shards = partial(plan_for_shards, self._file, self._options, self._split_max_bytes)

            def plan_it(measured: Measurement) -> Plan:
                return room.plan(partial(shards, measured))

            if measurement is not None:
                require_model("the measurement", measurement.source, self._file)
                with self._clock.stage("plan"):
                    return measurement, plan_it(measurement)
            weighed = load_importance(self._imatrix, self._hessian, self._encoder.name)
            measure = partial(
                measure_file,
                self._file,
                n_overhead_bytes=overhead_bytes(self._file, weighed.source if weighed else None),
                allow_requantize=self._allow_requantize,
                threads=self._threads,
                progress=self._progress,
            )
            if self._encoder.plans_by:
                self._feed_back = partial(
                    fed_back, measure=measure, encoder=self._encoder, imatrix=weighed
                )
            names = self._options.get("formats")
            return measure_and_plan(
                first_measure(measure, self._encoder, weighed, expand(names) if names else None),
                plan_it,
                self._options,
                self._clock.stage,
                preselects=self._file.n_weights >= MANY_WEIGHTS,
            )

    def refined(
        self, plan: Plan, measurement: Measurement, n_trials: int, at: Path | None
    ) -> tuple[Plan, Path]:
        """Return the plan after trials of swaps, and the journal of these trials."""
        wanted = at or self._output or beside(self._model, self._model.name)
        journal = refinement_journal(wanted, plan)
        with self._clock.stage("refine"):
            plan = refine_plan(
                self._model,
                plan,
                measurement,
                n_trials=n_trials,
                sensitivity=self._options.get("sensitivity"),
                imatrix=self._imatrix,
                journal=journal,
                threads=self._threads,
                executor=self._executor,
                progress=self._progress,
                announce=self._announce,
            )
        return plan, journal

    def fed_back(self, plan: Plan) -> Plan:
        """Return the plan for the encoder itself, where another one's errors chose its formats."""
        if self._feed_back is None:
            return plan
        with self._clock.stage("feed back"):
            return self._feed_back(plan)

    def written(self, plan: Plan, measurement: Measurement | None, *, verify: bool) -> Quantized:
        """Write and verify the planned output."""
        path = self._output or default_output(self._model, plan)
        destination = Destination(path, self._force, self._split_max_bytes)
        plan = settled(self._file, plan, destination)
        clock, shown = self._clock, self._progress
        worst = None
        with begin(self._file, plan, destination) as out:
            with clock.stage("write"):
                write(self._file, plan, out, threads=self._threads, progress=shown)
            if verify:
                with clock.stage("verify"), out.written() as written:
                    worst = verify_file(
                        self._file, plan, written, threads=self._threads, progress=shown
                    )
            with clock.stage("flush"):
                paths = out.commit()
        n_written = sum(p.stat().st_size for p in paths)
        return Quantized(paths, n_written, plan, measurement, worst, clock.seconds)
